"""Processes: setting them up, sharding a model over them (FSDP2), and summing over them.

One code path for one process and for many: a single process is a group of size 1. Rules that keep the ranks together:
every rank makes the same number of forward and backward calls, and no rank talks to the others while it decodes.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hov2.config import ConfigError

PATIENCE = timedelta(hours=4)  # how long ranks wait for each other: rank 0 may be downloading or writing a large model


def setup(name: str = "auto") -> torch.device:
    """Join the process group that torchrun describes, or make one of size 1; returns this rank's device.

    `name` is that of the device, as in the config. Raises ConfigError if there are fewer GPUs than processes on this
    machine.
    """
    device = device_of(name)
    alone = {}
    if "RANK" not in os.environ:
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if device.type == "cuda":
        use_cuda(device)
        # plain objects are gathered over gloo, tensors over NCCL
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE, device_id=device, **alone)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE, **alone)
    return device


def device_of(name: str) -> torch.device:
    """Return this process's device: "cpu", "cuda", or "auto", which is CUDA where there is any.

    Raises ConfigError for "cuda" without a GPU, and if this machine has fewer GPUs than processes.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if gpus < processes:
        raise ConfigError(
            f"device: {name!r} needs a GPU for each process on this machine, which has {gpus} for "
            f"{processes}; start as many processes as there are GPUs, or say device=cpu"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def use_cuda(device: torch.device) -> None:
    """Set for this process what hov2 needs of CUDA."""
    torch.cuda.set_device(device)
    # preferred on Hopper, it would build a plan for every new length of a prompt: 42 to 400 ms, and each is new
    torch.backends.cuda.enable_cudnn_sdp(False)


def cleanup() -> None:
    """Leave the process group."""
    dist.destroy_process_group()


def rank() -> int:
    """Return this process's number; before there is a process group, torchrun's word for it, or 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return how many processes there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the body on rank 0 first, then on the others: for downloads and other work that fills a shared cache."""
    if rank() != 0:
        barrier()
    try:
        yield
    finally:  # also when rank 0 fails: the others then fail by themselves instead of waiting for ever
        if rank() == 0:
            barrier()


def print0(text: str) -> None:
    """Print on rank 0; nothing for an empty text."""
    if text and rank() == 0:
        print(text, flush=True)


class WriteError(OSError):
    """A file that can't be written, for a full disk or the like; the message names it and says why."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Have an error of writing inside the block name the file: a full disk's own doesn't. Raises WriteError."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path}: can't be written: {error.strerror or error}") from error


def atomic_write(path: str | Path, text: str) -> None:
    """Write a file that is there as a whole or not at all, even if several processes write it at a time.

    Raises WriteError.
    """
    part = Path(f"{path}.{uuid.uuid4().hex}.unfinished")
    with writing(path):
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def store() -> dist.Store:
    """Return the process group's key-value store, which answers also while other ranks wait in a collective."""
    return dist.distributed_c10d._get_default_store()  # torch has no public way to it


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list:
    """Return every rank's `value` (any small picklable object), in rank order, on every rank.

    `group`: another process group of all ranks, for a thread of its own.
    """
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value, group)
    return values


def global_sum(values: Tensor) -> Tensor:
    """Return a tensor's sum over the ranks, the same on every rank; `values` stay as they are."""
    values = values.clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the named type; "auto" is bfloat16 on CUDA and float32 on the CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def make_mesh(device: torch.device, within_node: bool = False) -> DeviceMesh:
    """Return the devices that a model is sharded over: all, (ranks,), or within each node, (nodes, ranks of a node).

    How many ranks a node has is torchrun's LOCAL_WORLD_SIZE. With one node there is nothing to replicate. Raises
    ValueError for nodes of different sizes.
    """
    world = world_size()
    node_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    sizes = set(gather_objects(node_ranks))
    if not within_node or sizes == {world}:
        return init_device_mesh(device.type, (world,))
    if len(sizes) > 1:
        raise ValueError("shard_within_node: every node needs the same number of processes")
    return init_device_mesh(device.type, (world // node_ranks, node_ranks), mesh_dim_names=("replicate", "shard"))


def shard(policy: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, frozen: set[nn.Parameter]) -> nn.Module:
    """Shard a Policy by FSDP2: each decoder layer is one unit, the rest (embeddings, norm, lm_head) the root.

    Of a mesh's two dimensions the first one replicates (HSDP): weights are gathered within a node, and only gradients
    travel between nodes. Parameters stay in the type they have (float32 masters when trained), compute is in `dtype`,
    gradients are reduced in float32. `frozen` parameters (the towers) are kept whole on each rank: a rank may run them
    whenever it likes, without the others. A unit may mix trained and frozen parameters, if the trained ones share one
    type.
    """
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )
    for layer in policy.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    # the root keeps its weights through the backward pass: chunks of the head are recomputed with lm_head there
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=False, ignored_params=frozen)
    return policy


@contextmanager
def unsharded(policy: nn.Module) -> Iterator[None]:
    """Hold all of a Policy's weights on every rank, so that decoding needs no collective and no rank waits."""
    policy.set_reshard_after_forward(False)  # recursive
    for module in _units(policy):
        module.unshard()
    try:
        yield
    finally:
        reshard(policy)
        for layer in policy.layers:
            layer.set_reshard_after_forward(True)


def reshard(policy: nn.Module) -> None:
    """Give back all gathered weights, the root's too."""
    for module in _units(policy):
        module.reshard()


def _units(policy: nn.Module) -> list[FSDPModule]:
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor; a plain one is itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Means:
    """Means over a step, its micro-batches and all ranks, in which NaN values are left out; and sums of counts."""

    def __init__(self) -> None:
        self._means = {}  # name: tensor of (sum, count)
        self._sums = {}  # name: number

    def add(self, name: str, values: Tensor | list | float, weight: Tensor | float = 1.0) -> None:
        """Add a number, or each present number of a tensor or list, to a mean; `weight` counts each."""
        values = torch.as_tensor(values, dtype=torch.float32).detach().flatten()
        present = ~values.isnan()
        part = torch.stack([values.where(present, 0.0).sum(), present.sum()]) * weight
        self._means[name] = self._means.get(name, 0.0) + part

    def add_sum(self, name: str, value: float) -> None:
        """Add a number to a sum over the step and all ranks, such as a count of what happened."""
        self._sums[name] = self._sums.get(name, 0.0) + value

    def reduce(self) -> dict[str, float]:
        """Return {name: mean or sum over all ranks}, the same on every rank, and start anew.

        A mean is NaN where nothing was present.
        """
        own_means = {name: part.tolist() for name, part in self._means.items()}
        own_sums = self._sums
        self._means = {}
        self._sums = {}
        totals = {}
        counts = {}
        sums = {}
        for means_of_rank, sums_of_rank in gather_objects((own_means, own_sums)):
            for name, (total, count) in means_of_rank.items():
                totals[name] = totals.get(name, 0.0) + total
                counts[name] = counts.get(name, 0.0) + count
            for name, value in sums_of_rank.items():
                sums[name] = sums.get(name, 0.0) + value
        means = {name: totals[name] / counts[name] if counts[name] else float("nan") for name in totals}
        return means | sums
