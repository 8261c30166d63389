"""How a step's cost grows: with the prompt, the completions, their number, the vocabulary, and prompts in a step.

    python benchmarks/scaling.py

One axis at a time, from the sizes of `Size`; the exponent is the slope of log(cost) over log(size), fitted through all
points: 1 is linear. "whole" is the step's CPU seconds; "marginal" is the step less the part that doesn't grow along the
axis, which is measured by itself: one completion token for the completions' axes, a vocabulary of 64 for the head. For
log-probs it also counts the largest block of logits that exists at a time.
"""

import argparse
import math
from dataclasses import asdict, dataclass, replace

import kit
import torch
from thinker import random_completions, random_inputs, random_thinker, sampling_for, use_hov2_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hov2.grpo import grpo_loss
from hov2.model.encoder import Encoder
from hov2.model.prefix import group_logps
from hov2.model.rollout import generate, make_generator
from hov2.model.versions import checkpoint_activations


@dataclass(frozen=True)
class Size:
    """Of one step. 64 video tokens bring 24 of audio and 8 of text."""

    video: int = 512
    tokens: int = 64  # of a completion
    generations: int = 8
    vocab: int = 4096
    prompts: int = 1
    layers: int = 4
    hidden: int = 256


AXES = {  # field of Size: its values, and the size whose cost is not the axis's own
    "video": ((256, 512, 1024, 2048), None),
    "tokens": ((32, 64, 128, 256), {"tokens": 1, "generations": 1}),
    "generations": ((2, 4, 8, 16), {"tokens": 1, "generations": 1}),
    "vocab": ((4096, 8192, 16384, 32768), {"vocab": 64}),
    "prompts": ((1, 2, 4, 8), None),
}
NAMES = {
    "video": "prompt length",
    "tokens": "completion tokens",
    "generations": "G",
    "vocab": "vocabulary",
    "prompts": "prompts a rank",
}


class Step:
    """A GRPO step of hov2 at one size: `run()` gives CPU seconds of its phases."""

    def __init__(self, size):
        self.size = size
        self.thinker = use_hov2_attention(random_thinker(size.vocab, size.layers, size.hidden))
        checkpoint_activations(self.thinker, True)
        self.encoder = Encoder(self.thinker, torch.device("cpu"))
        part = max(1, size.video // 64)
        self.inputs = [
            random_inputs(size.vocab, size.video, 24 * part, 8 * part + 8, seed=i) for i in range(size.prompts)
        ]
        self.completions = [
            random_completions(size.vocab, size.generations, size.tokens, seed=i) for i in range(size.prompts)
        ]

    def run(self):
        """{"towers", "sampling", "reference", "update"}: CPU seconds."""
        size, clock = self.size, kit.Clock()
        with clock("towers"):
            prompts = [self.encoder(inputs) for inputs in self.inputs]
        self.thinker.eval()
        with clock("sampling"):
            generate(
                self.thinker,
                prompts,
                size.generations,
                sampling_for(size.vocab, size.tokens),
                [make_generator("cpu", 0, i) for i in range(size.prompts)],
            )
        self.thinker.train()
        for prompt, given in zip(prompts, self.completions):
            with clock("reference"), torch.no_grad():  # the same work as under another model
                reference, _ = group_logps(self.thinker, [prompt], [given])
            with clock("update"):
                logps, _ = group_logps(self.thinker, [prompt], [given])
                advantages = torch.linspace(-1, 1, size.generations)
                loss, _ = grpo_loss(logps[0], logps[0].detach(), reference[0], advantages, torch.ones_like(logps[0]))
                loss.backward()
        self.thinker.zero_grad(set_to_none=True)
        return dict(clock.cpu)

    def logits_mib(self):
        """MiB of the largest block of logits in forward and backward of one group's log-probs."""
        prompt = self.encoder(self.inputs[0])
        with _Largest(self.size.vocab) as largest:
            group_logps(self.thinker, [prompt], self.completions[:1])[0][0].sum().backward()
        self.thinker.zero_grad(set_to_none=True)
        return largest.bytes / 2**20


class _Largest(TorchFunctionMode):
    """The bytes of the largest tensor made inside with rows as wide as the vocabulary."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.bytes = vocab, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == self.vocab:
                self.bytes = max(self.bytes, tensor.nbytes)
        return output


def exponent(sizes, costs):
    """The slope of log(cost) over log(size), least squares; NaN if a cost isn't positive."""
    if min(costs) <= 0:
        return math.nan
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (sizes, costs))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())


def measure(base, axis, values, still, repeats):
    """One axis: {"values", "whole", "marginal", "towers", "logits"} with one entry a value, and the exponents."""
    sizes = [replace(base, **{axis: value}) for value in values]
    if still:
        sizes.append(replace(base, **still))
    steps = [Step(size) for size in sizes]
    for step in steps:
        step.run()  # warms up
    runs = [[] for _ in steps]
    for _, i in kit.interleaved(range(len(steps)), repeats):
        runs[i].append(steps[i].run())
    whole = [kit.median([sum(r.values()) for r in of_size]) for of_size in runs]
    towers = [kit.median([r["towers"] for r in of_size]) for of_size in runs][: len(values)]
    marginal = [cost - whole[-1] for cost in whole[:-1]] if still else None
    found = {
        "values": values,
        "whole": whole[: len(values)],
        "marginal": marginal,
        "towers": towers,
        "logits": [step.logits_mib() for step in steps[: len(values)]],
    }
    found["exponents"] = {
        name: exponent(values, found[name]) if found[name] else None
        for name in ("whole", "marginal", "towers", "logits")
    }
    return found


def report(result):
    """Prints the table of exponents and the costs behind it."""
    print(f"\n{kit.machine()}; from {result['base']}, medians of {result['repeats']}")
    kit.print_table(
        ["exponent of the cost in", "sizes", "whole", "marginal", "towers", "logits in memory"],
        [
            [
                NAMES[axis],
                ", ".join(map(str, found["values"])),
                *(found["exponents"][name] for name in ("whole", "marginal", "towers", "logits")),
            ]
            for axis, found in result["axes"].items()
        ],
    )
    for axis, found in result["axes"].items():
        costs = ", ".join(f"{cost:.2f}" for cost in found["whole"])
        print(f"{NAMES[axis]}: {costs} CPU s; logits {', '.join(f'{mib:.1f}' for mib in found['logits'])} MiB")


def arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description="How a step's cost grows.")
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--points", type=int, default=4, help="sizes on each axis, from the smallest")
    for name, default in asdict(Size()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return kit.parse(parser, argv)


def main(argv=None):
    """Runs, prints, and writes the JSON file if there is to be one."""
    job = arguments(argv)
    torch.set_num_threads(job.threads)
    base = Size(**{name: getattr(job, name) for name in asdict(Size())})
    result = {"base": asdict(base), "repeats": job.repeats, "axes": {}}
    for axis in job.axes:
        values, still = AXES[axis]
        result["axes"][axis] = measure(base, axis, values[: job.points], still, job.repeats)
    report(result)
    kit.write_json(job.json, result)


if __name__ == "__main__":
    main()
