"""One update (forward, loss, backward) of hov2 with its switches set otherwise: CPU seconds and memory.

    python benchmarks/variants.py                      the sizes of grpo_step.py, both vocabularies: 4 minutes
    python benchmarks/variants.py --vocab 2048 --json FILE

All variants give the same loss and gradient (printed: the largest difference of the gradient's norm).
"""

import argparse
from dataclasses import dataclass

import kit
import torch
from thinker import random_completions, random_inputs, random_thinker, use_hov2_attention

from hov2.engine.optim import clip_gradients
from hov2.grpo import grpo_loss
from hov2.model.encoder import Encoder
from hov2.model.prefix import group_logps
from hov2.model.versions import checkpoint_activations


@dataclass(frozen=True)
class Variant:
    """Settings of an update; the defaults are those of GRPOConfig."""

    completions_per_forward: int = 8
    logprob_chunk: int = 128
    gradient_checkpointing: bool = True


VARIANTS = {
    "default": Variant(),
    "completions_per_forward 4": Variant(completions_per_forward=4),
    "completions_per_forward 2": Variant(completions_per_forward=2),
    "logprob_chunk 32": Variant(logprob_chunk=32),
    "logprob_chunk 1024": Variant(logprob_chunk=1024),
    "gradient_checkpointing false": Variant(gradient_checkpointing=False),
}


def setup(name, vocab, job):
    """Builds one variant's thinker in its process."""
    global thinker, prompt, completions, variant, memory  # of this process
    variant, thinker = VARIANTS[name], use_hov2_attention(random_thinker(vocab))
    if variant.gradient_checkpointing:
        checkpoint_activations(thinker, True)
    thinker.train()
    prompt = Encoder(thinker, torch.device("cpu"))(random_inputs(vocab, video_tokens=job.video_tokens))
    completions = random_completions(vocab, 8, job.completion_tokens)
    memory = kit.Memory()


def update():
    """One update: {"cpu", "growth" (MiB), "norm"}."""
    clock = kit.Clock()
    memory.reset_peak()
    with clock("update"):
        parts = (x.split(variant.completions_per_forward) for x in (completions, torch.linspace(-1, 1, 8)))
        for given, advantages in zip(*parts):
            logps = group_logps(thinker, [prompt], [given], chunk=variant.logprob_chunk)[0][0]
            loss, _ = grpo_loss(
                logps, None, None, advantages, torch.ones_like(logps), beta=0.0, num_items=completions.numel()
            )
            loss.backward()
    growth, norm = memory.growth(), float(clip_gradients(thinker, float("inf")))
    thinker.zero_grad(set_to_none=True)
    return {"cpu": clock.cpu["update"], "growth": growth, "norm": norm}


def run(vocab, job):
    """{variant: {"cpu", "growth", "norm"}}, medians."""
    workers = kit.Workers(VARIANTS, 1, setup, vocab, job)
    runs = {name: [] for name in VARIANTS}
    for _, name in kit.interleaved(VARIANTS, job.repeats + 1):  # the first round warms up
        runs[name].append(workers.call(name, update))
    workers.close()
    return {
        name: {key: kit.median([r[key] for r in of_name[1:]]) for key in of_name[0]} for name, of_name in runs.items()
    }


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description="One update with its switches set otherwise.")
    parser.add_argument("--vocab", type=int, nargs="+", default=[2048, 32768])
    parser.add_argument("--video-tokens", type=int, default=1024)
    parser.add_argument("--completion-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    job = parser.parse_args(argv)
    results = {vocab: run(vocab, job) for vocab in job.vocab}
    for vocab, found in results.items():
        print(f"\n{kit.machine()}; V={vocab}, medians of {job.repeats}")
        first = found["default"]
        kit.print_table(
            ["one update", "CPU s", "beside default", "growth, MiB", "gradient norm less default's"],
            [
                [name, of["cpu"], of["cpu"] / first["cpu"], of["growth"], abs(of["norm"] / first["norm"] - 1)]
                for name, of in found.items()
            ],
        )
    kit.write_json(job.json, {"job": vars(job), "results": results})


if __name__ == "__main__":
    main()
