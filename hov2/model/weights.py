"""A thinker's weights on disk: read row by row into sharded parameters, written one tensor at a time.

No process ever holds a whole model, neither while it loads nor while it exports. Files are safetensors, in the layouts
that are published: a thinker by itself, or a full Qwen2.5-Omni with the thinker's keys under `thinker.`; in one file,
or in several with an index.
"""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import cached_file

from hov2.config import MediaConfig
from hov2.distributed import WriteError, gather_objects, rank, rank_zero_first
from hov2.model.layout import adapt, key_in, kind_of

INDEX = "model.safetensors.index.json"
INSIDE = ("model.language_model.", "model.visual.", "model.audio_tower.")  # how the thinker names its own parts
HEAD, EMBEDDINGS = "lm_head.weight", "model.language_model.embed_tokens.weight"  # which may be one and the same
ROWS = 4096  # of large tensors that are compared, at a time
WEIGHTS = (".safetensors", ".bin", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".distcp")  # endings
LARGEST_COPY = 100 * 2**20  # bytes of a file, or of a subfolder, that is copied into an export
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
    slices = _slices(folder)
    if HEAD not in parameters and HEAD in slices:  # tied: the one stands for the other
        slices.setdefault(EMBEDDINGS, slices[HEAD])
    unusable = []
    for name, parameter in parameters.items():
        if name not in slices or tuple(slices[name].get_shape()) != tuple(parameter.shape):
            unusable.append(name)
    if unusable:
        first = min(unusable)
        raise ModelError(f"{folder}: {len(unusable)} of the thinker's weights are missing or misshapen: {first}, ...")
    for name, parameter in parameters.items():
        fill(parameter, slices[name])


def heads_differ(folder: Path) -> bool:
    """Whether the folder's files have both an lm_head and embeddings, and these aren't the same numbers."""
    slices = _slices(folder)
    head, embeddings = slices.get(HEAD), slices.get(EMBEDDINGS)
    if head is None or embeddings is None:
        return False
    if head.get_shape() != embeddings.get_shape():
        return True
    for first in range(0, head.get_shape()[0], ROWS):
        if not torch.equal(head[first : first + ROWS], embeddings[first : first + ROWS]):
            return True
    return False


def _slices(folder: Path) -> dict[str, Any]:
    """Return {name in the thinker: what gives a tensor's rows} of all of a folder's weights."""
    slices = {}
    for path in _files(folder):
        file = safe_open(path, framework="pt")
        for key in file.keys():  # noqa: SIM118, no dict
            slices[thinker_name(key)] = file.get_slice(key)
    return slices


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


def export(
    policy: nn.Module,
    folder: str | Path,
    name: str,
    dtype: torch.dtype,
    kind: str | None = None,
    media: MediaConfig | None = None,
) -> None:
    """Write the policy as a Hugging Face folder: like the one it came from, or as a thinker or full Qwen2.5-Omni.

    `name` is the model that the run began with: its files are written anew, the thinker's tensors as `dtype`, tokenizer
    and other small files, subfolders too, as `layout.adapt` says, which `media` is for. `kind`: "thinker" leaves talker
    and vocoder out; "omni" is a full model, with those of the source if it has them; None is what the source is. All
    ranks call it, and gather one tensor at a time; rank 0 writes. A module with a `merged_weight` (LoRA) says itself
    what its weight has become. Raises WriteError, on all ranks, where the disk is full.
    """
    folder = Path(folder)
    source = source_folder(name)
    source_kind = kind_of(source)
    kind = kind or source_kind
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    output = _Output(unfinished)
    output.tried(_empty_folder, unfinished)
    names = {}  # of the thinker's parameters, both of tied weights: as files have them, to as this transformers does
    for parameter_name, _ in policy.thinker.named_parameters(remove_duplicate=False):
        names[thinker_name(parameter_name)] = parameter_name
    tied = policy.thinker.lm_head.weight is policy.thinker.get_input_embeddings().weight
    total_size = 0  # bytes of all tensors
    weight_map = {}  # {key in the export: file}
    for path in _files(source):
        keys = _keys_in(path, source_kind, kind)
        if keys:
            total_size += _write_like(path, output, policy.thinker, names, dtype, keys)
        weight_map |= dict.fromkeys(keys, path.name)
    output.tried(_copy_small_files, source, unfinished)
    output.tried(adapt, unfinished, source_kind, kind, dtype, tied, media)
    output.tried(_write_index, source, unfinished, weight_map, total_size)
    output.tried(_put_in_place, unfinished, folder)  # only now: it may be the very folder that the run began with
    problem = gather_objects(output.problem)[0]
    if problem:
        raise WriteError(f"{folder}: can't be written: {problem}")


class _Output:
    """What rank 0 writes. After the first error it writes no more: it has to go on gathering with the other ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = None  # that is being written
        self.problem = None  # why it can't be

    def tried(self, work: Callable, *args: Any) -> None:
        """Call `work(*args)`; nothing is done on other ranks and after an error."""
        if rank() or self.problem:
            return
        try:
            work(*args)
        except OSError as error:
            self.problem = error.strerror or str(error)
            with suppress(OSError):
                if self.file:
                    self.file.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def open(self, name: str) -> None:
        """Begin the file `name`."""
        self.tried(self._open, name)

    def write(self, content: bytes | np.ndarray) -> None:
        """Go on with the file."""
        self.tried(lambda: self.file.write(content))

    def close(self) -> None:
        """End the file."""
        self.tried(lambda: self.file.close())

    def _open(self, name: str) -> None:
        self.file = open(self.folder / name, "wb")  # noqa: SIM115, `close` closes it


def _empty_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _put_in_place(unfinished: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _copy_small_files(source: Path, target: Path) -> None:
    """Copy all but the weights from one model's folder to another."""
    for path in _small_files(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _small_files(folder: Path) -> list[Path]:
    """Return what is in a model's folder beside its weights, its subfolders' files too.

    Left out are hidden files, logs, subfolders with weights or checkpoints in them, which are other models and runs,
    and what is too large to be a part of a model, which is said.
    """
    files = []
    for path in sorted(folder.iterdir()):
        inside = [path]
        if path.is_dir():
            inside = [file for file in path.rglob("*") if file.is_file()]
            if path.name.startswith(("checkpoint-", "earlier-")) or any(_is_weights(file) for file in inside):
                continue
        if path.name.startswith(".") or _is_weights(path) or path.suffix == ".jsonl":
            continue
        if sum(file.stat().st_size for file in inside) > LARGEST_COPY:
            print(f"{path}: not copied to the exported model, larger than {LARGEST_COPY:,} bytes", flush=True)
        else:
            files += inside
    return files


def _is_weights(path: Path) -> bool:
    return path.name.endswith((*WEIGHTS, ".bin.index.json"))


def _write_index(source: Path, target: Path, weight_map: dict[str, str], total_size: int) -> None:
    """Write the index of weights in several files, {key: file} and their new size; nothing for a model in one file."""
    if (source / INDEX).exists():
        index = json.loads((source / INDEX).read_text(encoding="utf-8"))
        index["metadata"] = index.get("metadata", {}) | {"total_size": total_size}
        index["weight_map"] = weight_map
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _keys_in(path: Path, source_kind: str, kind: str) -> dict[str, str]:
    """Return {key in an export of `kind`: key} of what a safetensors file has for it."""
    keys = {}
    for key in _header(path)[0]:
        exported = key_in(key, source_kind, kind)
        if exported is not None:
            keys[exported] = key
    return keys


def _header(path: Path) -> tuple[dict[str, dict], int]:
    """Return a safetensors file's header, {key: its "dtype", "shape" and "data_offsets"}, and where tensors begin."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _exported(thinker: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    """Return the thinker's tensor `name`, whole, as it is written."""
    path, _, leaf = name.rpartition(".")
    module = thinker.get_submodule(path)
    if leaf == "weight" and hasattr(module, "merged_weight"):
        return module.merged_weight().to(dtype)
    return whole(getattr(module, leaf).detach().to(dtype))


def _write_like(
    path: Path, output: _Output, thinker: nn.Module, names: dict[str, str], dtype: torch.dtype, keys: dict[str, str]
) -> int:
    """Write the safetensors file `path` anew, with the thinker's own tensors for `names`, as `dtype`.

    names: {as `thinker_name` gives it: the parameter's name in this version of transformers}; keys: {new key: old one}
    of the tensors that are written. Returns the bytes of all tensors.

    The format: the header's length in 8 bytes, the header as JSON, then the tensors' bytes one after the other; those
    of larger types first, so that each starts at a multiple of its type's size.
    """
    old_header, old_start = _header(path)
    with open(path, "rb") as old:
        header = _new_header({key: old_header[old_key] for key, old_key in keys.items()}, names, dtype)
        text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
        text += b" " * (-len(text) % 8)
        output.open(path.name)
        output.write(len(text).to_bytes(8, "little") + text)
        for key in header:
            if thinker_name(key) in names:
                tensor = _exported(thinker, names[thinker_name(key)], dtype)
                output.write(tensor.cpu().contiguous().view(torch.uint8).numpy())
            else:
                begin, end = old_header[keys[key]]["data_offsets"]
                old.seek(old_start + begin)
                output.write(old.read(end - begin))
        output.close()
    return max(entry["data_offsets"][1] for entry in header.values())


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
