"""Trains tiny models for a few updates, sharded in all ways, and measures what loading and exporting hold.

    torchrun --nproc_per_node N tests/support/sharding_runs.py RUNS.json M        M of the processes count as one node

RUNS.json: [[name, {key of the config: value}], ...]. Each run writes `name.json` and `name.safetensors` (the first
update's gradients, whole) beside it, and exports to `name/`.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from hov2 import distributed
from hov2.config import GRPOConfig, LoRAConfig
from hov2.engine.optim import clip_gradients, make_optimizer
from hov2.model.lora import adapters_off
from hov2.model.prefix import group_logps
from hov2.model.rollout import Sampling, generate, make_generator
from hov2.model.thinker import load_policy, load_reference, set_training
from hov2.model.weights import export, whole
from tests.support.modelkit import random_completions, random_prompts

OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)
UPDATES = 3


def peak_bytes(work, mapped=()):
    """(what `work()` returns, the most bytes that torch's allocator had given out meanwhile beyond those at first).

    mapped: sizes of files that are mapped rather than read: the allocator reports such a mapping, which takes no memory
    of its own.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = work()
    sizes, queue = [], list(record.profiler.kineto_results.experimental_event_tree())
    while queue:
        event = queue.pop()
        queue += event.children
        if event.name == "[memory]" and abs(event.extra_fields.alloc_size) not in mapped:
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    now = peak = 0
    for _, size in sorted(sizes, key=lambda pair: pair[0]):
        now += size
        peak = max(peak, now)
    return result, peak


def held_bytes(*models, optimizer=None):
    """Bytes of this rank's weights, gradients and optimiser states, each storage once."""
    tensors = [t for model in models if model is not None for p in model.parameters() for t in (p, p.grad)]
    tensors += [t for state in optimizer.state.values() for t in state.values()] if optimizer else []
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def train(config, device, out):
    """A few updates over four groups, this rank's share of them in as many passes; returns what tests compare."""
    rank, world = distributed.rank(), distributed.world_size()
    mapped = [path.stat().st_size for path in Path(config.model).glob("*.safetensors")]
    policy, peak = peak_bytes(lambda: load_policy(config, device), mapped)
    buffers = sum(buffer.nbytes for buffer in policy.buffers())  # computed, on every rank
    found = {"load": {"peak": peak, "held": held_bytes(policy), "buffers": buffers}}
    reference, peak = peak_bytes(lambda: load_reference(config, device, policy), mapped)
    found["reference"] = {"peak": peak, "held": held_bytes(reference), "shared": reference is policy}
    optimizer = make_optimizer(policy, config)
    prompts, completions = random_prompts(policy.thinker, 4), random_completions(4, lengths=(7, 5, 6, 4))
    mine = range(rank, 4, world)
    targets = [torch.randn(c.shape, generator=torch.Generator().manual_seed(i)) for i, c in enumerate(completions)]

    def logps(model, i):
        return model(group_logps, [prompts[i]], [completions[i]], 1.0, 4)[0][0]

    def no_gradient(model):
        with torch.no_grad():
            values = {i: logps(model, i).flatten().tolist() for i in mine}
        distributed.reshard(model)
        return [
            values
            for _, values in sorted({k: v for d in distributed.gather_objects(values) for k, v in d.items()}.items())
        ]

    def generated():
        with torch.no_grad(), distributed.unsharded(policy):
            sampling = Sampling(5 + rank, [], 0, torch.tensor([], dtype=torch.long))  # ranks may decode unequally long
            return policy(generate, [prompts[0]], 2, sampling, [make_generator(device, 1)])[0].completion_ids[:, :5]

    found |= {"norms": [], "before": no_gradient(policy)}
    for step in range(UPDATES):
        set_training(policy, False, True)
        found["tokens"] = generated().tolist()
        set_training(policy, True, True)
        for i in mine:
            policy.set_requires_gradient_sync(i == mine[-1])
            (((logps(policy, i) - targets[i]) ** 2).sum() / 100 * world).backward()
        if step == 0:
            gradients = {n: whole(p.grad) for n, p in policy.named_parameters() if p.grad is not None}
            if rank == 0:
                save_file({n: g.contiguous() for n, g in gradients.items()}, f"{out}.safetensors")
        if step == UPDATES - 1:
            step_end = held_bytes(policy, reference, optimizer=optimizer)
        found["norms"].append(clip_gradients(policy, 1.0).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    set_training(policy, False, True)
    found |= {"all": step_end, "after": no_gradient(policy)}
    with adapters_off():
        found["off"] = no_gradient(reference)
    found["export"] = peak_bytes(lambda: export(policy, out, config.model, torch.float32))[1]
    found["restored"] = restored(config, device, policy, optimizer, f"{out}.checkpoint")
    return found


def restored(config, device, policy, optimizer, folder):
    """Whether a fresh policy and optimiser are equal to these after a checkpoint's way through the disk."""
    model, optim = get_state_dict(policy, optimizer, options=OPTIONS)
    dcp.save({"model": model, "optim": optim}, checkpoint_id=folder)
    fresh = load_policy(config, device)
    again = make_optimizer(fresh, config)
    model, optim = get_state_dict(fresh, again, options=OPTIONS)
    dcp.load({"model": model, "optim": optim}, checkpoint_id=folder)
    set_state_dict(fresh, again, model_state_dict=model, optim_state_dict=optim, options=OPTIONS)
    pairs = list(zip(policy.parameters(), fresh.parameters()))
    trained = [(a, b) for a, b in pairs if a.requires_grad]
    pairs += [(optimizer.state[a][key], again.state[b][key]) for a, b in trained for key in optimizer.state[a]]
    return all(torch.equal(whole(a), whole(b)) and a.dtype == b.dtype for a, b in pairs) and bool(trained)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = sys.argv[2]
    device, folder = distributed.setup(), Path(sys.argv[1]).parent
    for name, values in json.loads(Path(sys.argv[1]).read_text()):
        if values.get("lora"):
            values["lora"] = LoRAConfig(**values["lora"])
        config = GRPOConfig(model=str(folder / "model"), output_dir="", data=[], learning_rate=1e-3, **values)
        found = distributed.gather_objects(train(config, device, folder / name))
        if distributed.rank() == 0:
            (folder / f"{name}.json").write_text(json.dumps(found))
    distributed.cleanup()
