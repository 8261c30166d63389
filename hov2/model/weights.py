"""A thinker's weights on disk: read row by row into sharded parameters, written one tensor at a time.

No process ever holds a whole model, neither while it loads nor while it exports. Files are safetensors, in the layouts
that are published: a thinker by itself, or a full Qwen2.5-Omni with the thinker's keys under `thinker.`; in one file,
or in several with an index.
"""

import json
import math
import os
import shutil
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers.utils import cached_file

from hov2.distributed import barrier, rank, rank_zero_first

INDEX = "model.safetensors.index.json"
INSIDE = ("model.language_model.", "model.visual.", "model.audio_tower.")  # how the thinker names its own parts
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # safetensors' words for them


class ModelError(ValueError):
    """A model that can't be loaded; the message names it and says what would be right."""


def source_folder(name):
    """The folder of a model's files: `name` itself, or where the hub's files were put."""
    return Path(name) if Path(name).is_dir() else Path(cached_file(name, "config.json")).parent


def fetch(name):
    """The folder with the weights of `name`; those of a hub id are downloaded first. OSError if they can't be had."""
    if not Path(name).is_dir():
        with rank_zero_first():
            try:
                cached_file(name, INDEX)
            except OSError:  # none: the model is in one file
                cached_file(name, "model.safetensors")
            for path in _files(source_folder(name)):
                cached_file(name, path.name)
    return source_folder(name)


def thinker_name(key):
    """A tensor's name in the thinker, from its key in a file; keys of the talker and the vocoder stay as they are.

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


def read_weights(parameters, folder):
    """Fills `parameters`, {name in the thinker: parameter}, from the folder's files, each rank reading its own rows.

    Raises ModelError for weights that are missing or have another shape; SafetensorError for a broken file.
    """
    parameters = {thinker_name(name): parameter for name, parameter in parameters.items()}
    files = [safe_open(path, framework="pt") for path in _files(folder)]
    slices = {thinker_name(key): file.get_slice(key) for file in files for key in file.keys()}  # noqa: SIM118, no dict
    absent = sorted(name for name, parameter in parameters.items()
                    if name not in slices or tuple(slices[name].get_shape()) != tuple(parameter.shape))
    if absent:
        raise ModelError(f"{folder}: {len(absent)} of the thinker's weights are missing or misshapen: {absent[0]}, ...")
    for name, parameter in parameters.items():
        fill(parameter, slices[name])


@torch.no_grad()
def fill(parameter, values):
    """Copies `values`, which gives rows as `values[a:b]`, into a parameter; if that is sharded, this rank's rows only.

    The last dimension of the parameter's device mesh is the one that its rows are sharded over, as FSDP2 does it:
    equal pieces, but for the last ones.
    """
    first, local = 0, parameter
    if isinstance(parameter, DTensor):
        mesh, local = parameter.device_mesh, parameter.to_local()
        first = mesh.get_local_rank(mesh.ndim - 1) * -(-len(parameter) // mesh.size(-1))
    if len(local):
        local.copy_(values[first:first + len(local)])


def whole(tensor):
    """A sharded tensor as a plain one on every rank; all ranks call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def export(policy, folder, name, dtype):
    """Writes the policy as a Hugging Face folder like the one it came from: what went in comes out.

    `name` is the model that the run began with: its files are written anew, a thinker's as a thinker's and those of a
    full Qwen2.5-Omni with its talker and vocoder, the thinker's tensors as `dtype`. Tokenizer and other small files are
    copied. All ranks call it, and gather one tensor at a time; rank 0 writes. A module with a `merged_weight` (LoRA)
    says itself what its weight has become.
    """
    folder, source = Path(folder), source_folder(name)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    parameters = policy.thinker.named_parameters(remove_duplicate=False)  # both names of tied weights
    names = {thinker_name(name): name for name, _ in parameters}
    for path in _files(source):
        _write_like(path, unfinished / path.name, policy.thinker, names, dtype)
    if rank() == 0:
        for path in source.iterdir():
            if path.is_file() and not path.name.endswith((".safetensors", ".bin", ".bin.index.json")):
                shutil.copy(path, unfinished / path.name)
        config = json.loads((source / "config.json").read_text())
        if config["model_type"] != "qwen2_5_omni":  # there it speaks of the other parts too
            config["dtype"] = str(dtype).removeprefix("torch.")
            (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)  # only now: it may be the very folder that the run began with
        unfinished.rename(folder)
    barrier()


def _exported(thinker, name, dtype):
    """The thinker's tensor `name`, whole, as it is written."""
    path, _, leaf = name.rpartition(".")
    module = thinker.get_submodule(path)
    if leaf == "weight" and hasattr(module, "merged_weight"):
        return module.merged_weight().to(dtype)
    return whole(getattr(module, leaf).detach().to(dtype))


def _write_like(path, target, thinker, names, dtype):
    """Writes the safetensors file `path` anew to `target`, with the thinker's own tensors for `names`, as `dtype`.

    names: {as `thinker_name` gives it: the parameter's name in this version of transformers}.

    The format: the header's length in 8 bytes, the header as JSON, then the tensors' bytes one after the other; those
    of larger types first, so that each starts at a multiple of its type's size.
    """
    with open(path, "rb") as old, open(target if rank() == 0 else os.devnull, "wb") as new:
        start = 8 + int.from_bytes(old.read(8), "little")
        header, sizes = json.loads(old.read(start - 8)), {}
        header.pop("__metadata__", None)
        for key, entry in header.items():
            sizes[key] = entry["data_offsets"][1] - entry["data_offsets"][0]
            if thinker_name(key) in names:
                entry["dtype"], sizes[key] = TYPES[dtype], math.prod(entry["shape"]) * dtype.itemsize
        order = sorted(header, key=lambda key: -sizes[key] // max(1, math.prod(header[key]["shape"])))
        ends = dict(zip(order, accumulate(sizes[key] for key in order)))
        laid = {key: header[key] | {"data_offsets": [ends[key] - sizes[key], ends[key]]} for key in order}
        text = json.dumps({"__metadata__": {"format": "pt"}} | laid).encode()
        text += b" " * (-len(text) % 8)
        new.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            if thinker_name(key) in names:
                tensor = _exported(thinker, names[thinker_name(key)], dtype)
                new.write(tensor.cpu().contiguous().view(torch.uint8).numpy())
            else:
                old.seek(start + header[key]["data_offsets"][0])
                new.write(old.read(sizes[key]))


def _files(folder):
    """The paths of a folder's weights: those that its index names, or all of them."""
    index = Path(folder) / INDEX
    if index.exists():
        return sorted({index.with_name(file) for file in json.loads(index.read_text())["weight_map"].values()})
    return sorted(Path(folder).glob("*.safetensors"))
