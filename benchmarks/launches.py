"""Kernels that a GPU launches for one decoded token, counted without a GPU.

    python benchmarks/launches.py                      the 7B's sizes; 1 prompt x 8 and 8 prompts x 8 rows, 15 s

Decoding on a GPU reads all weights for a handful of rows: its arithmetic is nothing, and the time between kernels
counts. The step that CUDA runs is run here on the meta device, which has shapes and no numbers, and every operation
that would launch a kernel is counted; views and allocations launch none. As a CUDA graph the step's kernels are
launched all at once; those of choosing the token are not part of it.
"""

import argparse
from collections import Counter
from unittest.mock import patch

import kit
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hov2.config import LoRAConfig
from hov2.model import rollout
from hov2.model.attention import stacked_projections
from hov2.model.encoder import Prompt
from hov2.model.lora import add_lora
from hov2.model.versions import decoder_of
from hov2.tools import plan

# operations that only describe memory anew, or take some
NO_KERNEL = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "split",
    "permute",
    "split_with_sizes",
    "detach",
    "alias",
    "as_strided",
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "unbind",
    "new_empty_strided",
    "_reshape_alias",
    "lift_fresh",
}
META = torch.device("meta")


class KernelCounter(TorchDispatchMode):
    """Counts the operations below it that launch a kernel, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        if name not in NO_KERNEL:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def fused_norm(x, shape, weight, eps):
    """Stands for torch's `rms_norm`, one kernel on CUDA; on meta it would take the CPU's way, in eight operations."""
    return torch.abs(x)


@torch.no_grad()
@patch("torch.nn.functional.rms_norm", fused_norm)
def count(thinker, prompts, generations, prompt_tokens=2048, completion_tokens=1024):
    """{"step": Counter, "choosing": Counter}: the kernels of one decoded token of `prompts` x `generations` rows."""
    ids = torch.zeros(prompt_tokens, dtype=torch.long, device=META)
    positions = torch.zeros(3, prompt_tokens, dtype=torch.long, device=META)
    batch = [Prompt(ids, positions, None, None)] * prompts
    hidden, cache = rollout._prefill(thinker, batch, generations, completion_tokens)
    step = rollout._Step(thinker, cache, "fixed")
    rows = torch.zeros(prompts * generations, dtype=torch.long, device=META)
    with stacked_projections(thinker):
        step(rows, rows, 0)  # allocates what the next ones use again
        with KernelCounter() as of_step:
            hidden = step(rows, rows, 1)

    def noise(width):
        drawn = [torch.empty(generations, width, device=META).exponential_() for _ in batch]
        return torch.cat(drawn)[rows]

    sampling = rollout.Sampling(completion_tokens, [1, 2], 2, torch.zeros(3, dtype=torch.long, device=META), 0.9, 50)
    with KernelCounter() as of_choosing:
        logits = F.linear(hidden, thinker.lm_head.weight).float()
        rollout._sample(logits, sampling, sampling.suppressed_ids, noise)
    return {"step": of_step.counts, "choosing": of_choosing.counts}


def main(argv=None):
    """Counts and prints the table."""
    parser = argparse.ArgumentParser(description="Kernels a decoded token, counted without a GPU.")
    parser.add_argument("--names", action="store_true", help="also: how often each operation of a step is launched")
    parser.add_argument("--json", metavar="FILE")
    asked = parser.parse_args(argv)
    results = []
    for lora in (False, True):
        thinker = plan.published_thinker("Qwen/Qwen2.5-Omni-7B")
        if lora:
            add_lora(thinker, LoRAConfig())
        for prompts in (1, 8):
            found = count(thinker, prompts, 8)
            results.append({"rows": f"{prompts} x 8", "lora": lora, **found})
    layers = len(decoder_of(thinker).layers)
    print(f"torch {torch.__version__}, {layers} layers, prompts of 2,048 tokens; kernels a decoded token")
    kit.print_table(
        ["rows", "LoRA", "a step", "of these a layer", "choosing the token"],
        [
            [
                found["rows"],
                "yes" if found["lora"] else "no",
                found["step"].total(),
                found["step"].total() / layers,
                found["choosing"].total(),
            ]
            for found in results
        ],
    )
    if asked.names:
        for found in results:
            print(found["rows"], "LoRA" if found["lora"] else "", dict(found["step"].most_common()))
    kit.write_json(asked.json, results)


if __name__ == "__main__":
    main()
