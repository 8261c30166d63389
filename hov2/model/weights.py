"""A thinker's weights on disk: read row by row into sharded parameters, written one tensor at a time.

No process ever holds a whole model, neither while it loads nor while it exports. Files are safetensors, in the layouts
that are published: a thinker by itself, or a full Qwen2.5-Omni with the thinker's keys under `thinker.`; in one file,
or in several with an index.
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import cached_file

from hov2.distributed import barrier, rank, rank_zero_first

INDEX = "model.safetensors.index.json"
INSIDE = ("model.language_model.", "model.visual.", "model.audio_tower.")  # how the thinker names its own parts
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # safetensors' words for them


class ModelError(ValueError):
    """A model that can't be loaded; the message names it and says what would be right."""


def source_folder(name: str) -> Path:
    """Return the folder of a model's files: `name` itself, or where the hub's files were put."""
    if Path(name).is_dir():
        return Path(name)
    return Path(cached_file(name, "config.json")).parent


def fetch(name: str) -> Path:
    """Return the folder with the weights of `name`; those of a hub id are downloaded first.

    Raises OSError if they can't be had.
    """
    if not Path(name).is_dir():
        with rank_zero_first():
            try:
                cached_file(name, INDEX)
            except OSError:  # none: the model is in one file
                cached_file(name, "model.safetensors")
            for path in _files(source_folder(name)):
                cached_file(name, path.name)
    return source_folder(name)


def thinker_name(key: str) -> str:
    """Return a tensor's name in the thinker, from its key in a file; those of talker and vocoder stay as they are.

    These are the names that transformers has given them since 5.21. Published checkpoints (and older versions of
    transformers) say `model.X`, `visual.X` and `audio_tower.X` (full ones with `thinker.` before it) for
    `model.language_model.X`, `model.visual.X` and `model.audio_tower.X`; the latter are understood too.
    """
    name = key.removeprefix("thinker.")
    if name.startswith(("visual.", "audio_tower.")):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith(INSIDE):
        return INSIDE[0] + name.removeprefix("model.")
    return name


def read_weights(parameters: dict[str, Tensor], folder: Path) -> None:
    """Fill `parameters`, {name in the thinker: parameter}, from the folder's files, each rank reading its own rows.

    Raises ModelError for weights that are missing or have another shape; SafetensorError for a broken file.
    """
    parameters = {thinker_name(name): parameter for name, parameter in parameters.items()}
    slices = {}
    for path in _files(folder):
        file = safe_open(path, framework="pt")
        for key in file.keys():  # noqa: SIM118, no dict
            slices[thinker_name(key)] = file.get_slice(key)
    unusable = []
    for name, parameter in parameters.items():
        if name not in slices or tuple(slices[name].get_shape()) != tuple(parameter.shape):
            unusable.append(name)
    if unusable:
        first = min(unusable)
        raise ModelError(f"{folder}: {len(unusable)} of the thinker's weights are missing or misshapen: {first}, ...")
    for name, parameter in parameters.items():
        fill(parameter, slices[name])


@torch.no_grad()
def fill(parameter: Tensor, values: Any) -> None:
    """Copy `values`, which gives rows as `values[a:b]`, into a parameter; if that is sharded, this rank's rows only.

    The last dimension of the parameter's device mesh is the one that its rows are sharded over, as FSDP2 does it:
    equal pieces, but for the last ones.
    """
    first = 0
    local = parameter
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        rows_per_rank = -(-len(parameter) // mesh.size(-1))  # rounded up
        first = mesh.get_local_rank(mesh.ndim - 1) * rows_per_rank
        local = parameter.to_local()
    if len(local):
        local.copy_(values[first : first + len(local)])


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor as a plain one on every rank; all ranks call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def export(policy: nn.Module, folder: str | Path, name: str, dtype: torch.dtype) -> None:
    """Write the policy as a Hugging Face folder like the one it came from: what went in comes out.

    `name` is the model that the run began with: its files are written anew, a thinker's as a thinker's and those of a
    full Qwen2.5-Omni with its talker and vocoder, the thinker's tensors as `dtype`. Tokenizer and other small files are
    copied. All ranks call it, and gather one tensor at a time; rank 0 writes. A module with a `merged_weight` (LoRA)
    says itself what its weight has become.
    """
    folder = Path(folder)
    source = source_folder(name)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    names = {}  # of the thinker's parameters, both of tied weights: as files have them, to as this transformers does
    for parameter_name, _ in policy.thinker.named_parameters(remove_duplicate=False):
        names[thinker_name(parameter_name)] = parameter_name
    for path in _files(source):
        _write_like(path, unfinished / path.name, policy.thinker, names, dtype)
    if rank() == 0:
        _copy_small_files(source, unfinished, dtype)
        shutil.rmtree(folder, ignore_errors=True)  # only now: it may be the very folder that the run began with
        unfinished.rename(folder)
    barrier()


def _copy_small_files(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy all but the weights from one model's folder to another; the config of a thinker then names `dtype`."""
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith((".safetensors", ".bin", ".bin.index.json")):
            shutil.copy(path, target / path.name)
    config = json.loads((source / "config.json").read_text())
    if config["model_type"] != "qwen2_5_omni":  # there it speaks of the other parts too
        config["dtype"] = str(dtype).removeprefix("torch.")
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _exported(thinker: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    """Return the thinker's tensor `name`, whole, as it is written."""
    path, _, leaf = name.rpartition(".")
    module = thinker.get_submodule(path)
    if leaf == "weight" and hasattr(module, "merged_weight"):
        return module.merged_weight().to(dtype)
    return whole(getattr(module, leaf).detach().to(dtype))


def _write_like(path: Path, target: Path, thinker: nn.Module, names: dict[str, str], dtype: torch.dtype) -> None:
    """Write the safetensors file `path` anew to `target`, with the thinker's own tensors for `names`, as `dtype`.

    names: {as `thinker_name` gives it: the parameter's name in this version of transformers}.

    The format: the header's length in 8 bytes, the header as JSON, then the tensors' bytes one after the other; those
    of larger types first, so that each starts at a multiple of its type's size.
    """
    with open(path, "rb") as old, open(target if rank() == 0 else os.devnull, "wb") as new:
        old_start = 8 + int.from_bytes(old.read(8), "little")  # of the tensors
        old_header = json.loads(old.read(old_start - 8))
        old_header.pop("__metadata__", None)
        header = _new_header(old_header, names, dtype)
        text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
        text += b" " * (-len(text) % 8)
        new.write(len(text).to_bytes(8, "little") + text)
        for key in header:
            if thinker_name(key) in names:
                tensor = _exported(thinker, names[thinker_name(key)], dtype)
                new.write(tensor.cpu().contiguous().view(torch.uint8).numpy())
            else:
                begin, end = old_header[key]["data_offsets"]
                old.seek(old_start + begin)
                new.write(old.read(end - begin))


def _new_header(old_header: dict[str, dict], names: dict[str, str], dtype: torch.dtype) -> dict[str, dict]:
    """Return the header with the tensors of `names` as `dtype`, in the order and at the places where they will lie."""
    sizes = {}  # bytes
    entries = {}
    for key, entry in old_header.items():
        begin, end = entry["data_offsets"]
        sizes[key] = end - begin
        entries[key] = entry
        if thinker_name(key) in names:
            sizes[key] = math.prod(entry["shape"]) * dtype.itemsize
            entries[key] = entry | {"dtype": TYPES[dtype]}

    def bytes_a_number(key: str) -> int:
        return sizes[key] // max(1, math.prod(entries[key]["shape"]))

    header = {}
    place = 0
    for key in sorted(entries, key=bytes_a_number, reverse=True):
        header[key] = entries[key] | {"data_offsets": [place, place + sizes[key]]}
        place += sizes[key]
    return header


def _files(folder: Path) -> list[Path]:
    """Return the paths of a folder's weights: those that its index names, or all of them."""
    index = folder / INDEX
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    weight_map = json.loads(index.read_text())["weight_map"]
    return sorted({index.with_name(file) for file in weight_map.values()})
