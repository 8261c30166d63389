"""How much memory a run needs on each GPU, before one is bought: `python -m hov2.tools.plan CONFIG`.

    python -m hov2.tools.plan configs/stage2.json --gpus 8 --memory 80 [key=value ...]
    python -m hov2.tools.plan configs/one_gpu/stage2.json --gpus 1 --memory 24

Arithmetic on the model's shapes (no weight is read) and on the config; docs/memory.md has the formulas. What a run
holds all the time and what a phase adds are kept apart: the peak is the largest phase. Exit code 1 if it doesn't fit.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen2_5OmniThinkerConfig

from hov2.config import BaseConfig, ConfigError, EvalConfig, GRPOConfig, LoRAConfig, SFTConfig
from hov2.config_io import read_config
from hov2.model.lora import add_lora
from hov2.model.thinker import design, tower_parameters
from hov2.model.versions import decoder_of
from hov2.model.weights import ModelError

GIB = 2**30
FLOAT = 4  # bytes of a trained weight, of its gradient as it is summed over ranks, and of a logit
PUBLISHED = {  # sizes known without any file: where these differ from transformers' defaults
    "Qwen/Qwen2.5-Omni-7B": {"vision_config": {"hidden_size": 1280}},
    "Qwen/Qwen2.5-Omni-3B": {
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "max_window_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048},
        "audio_config": {"output_dim": 2048},
    },
}


@dataclass(frozen=True)
class Shapes:
    """What the formulas need of a thinker."""

    # numbers of weights
    decoder: int  # embeddings, layers and head, without adapters
    layer: int  # one of the decoder's
    trained: int  # all of the decoder's, or those of the adapters
    towers: int
    # sizes
    layers: int
    hidden: int
    heads: int  # query heads x head size
    kv: int  # key-value heads x head size
    mlp: int
    vocab: int
    lora: bool  # whether adapters are trained instead of the weights


def shapes_of(thinker: nn.Module, lora: LoRAConfig | None = None) -> Shapes:
    """Return the Shapes of a thinker, also on the meta device. With `lora`, it is given these adapters first."""
    towers = tower_parameters(thinker)
    text = thinker.config.get_text_config()
    decoder = _numbers(parameter for parameter in thinker.parameters() if parameter not in towers)
    layer = _numbers(decoder_of(thinker).layers[0].parameters())
    if lora:
        add_lora(thinker, lora)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shapes(
        decoder=decoder,
        layer=layer,
        trained=_numbers(parameter for parameter in thinker.parameters() if parameter.requires_grad),
        towers=_numbers(towers),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads * head_size,
        kv=text.num_key_value_heads * head_size,
        mlp=text.intermediate_size,
        vocab=text.vocab_size,
        lora=lora is not None,
    )


def _numbers(parameters: Iterable[nn.Parameter]) -> int:
    """Return how many numbers these parameters hold together."""
    return sum(parameter.numel() for parameter in parameters)


def held(shapes: Shapes, config: BaseConfig, gpus: int, width: int = 2) -> dict[str, int]:
    """Return {what: bytes} that a GPU holds all the time; `width`: bytes of a number in the compute type."""
    if isinstance(config, EvalConfig):
        return {"weights": width * shapes.decoder // gpus, "towers": width * shapes.towers}
    states = 0 if config.optimizer_states == "cpu" else 2 * FLOAT
    frozen = width * shapes.decoder if shapes.lora else 0
    has_reference = getattr(config, "beta", 0) and not shapes.lora
    return {
        "weights": (frozen + FLOAT * shapes.trained) // gpus,
        "gradients": FLOAT * shapes.trained // gpus,
        "optimizer": states * shapes.trained // gpus,
        "reference": width * shapes.decoder // gpus if has_reference else 0,
        "towers": width * shapes.towers,
    }


def rollout(
    shapes: Shapes, config: GRPOConfig | EvalConfig, prompts: int, prompt_tokens: int, width: int = 2
) -> dict[str, int]:
    """Return {what: bytes} that decoding `prompts` groups together adds: all weights gathered, and keys and values."""
    rows = prompts * (config.num_samples if isinstance(config, EvalConfig) else config.num_generations)
    cached_tokens = prompts * prompt_tokens + rows * config.max_completion_length
    return {
        "weights gathered": width * shapes.decoder,
        "stacked projections": width * shapes.layers * shapes.hidden * (shapes.heads + 2 * shapes.kv),
        "prefill": width * prompt_tokens * (4 * shapes.hidden + 3 * shapes.mlp),  # of one prompt, one layer
        "KV cache": kv_bytes(shapes, cached_tokens, width),
        "logits": 3 * FLOAT * rows * shapes.vocab,
    }


def kv_bytes(shapes: Shapes, tokens: int, width: int = 2) -> int:
    """Return the bytes of the keys and values of `tokens` tokens, in all layers."""
    return shapes.layers * 2 * shapes.kv * tokens * width


def update(
    shapes: Shapes,
    config: SFTConfig | GRPOConfig,
    tokens: int,
    accumulates: bool,
    gpus: int,
    width: int = 2,
) -> dict[str, int]:
    """Return {what: bytes} that forward and backward over a row of `tokens` tokens add.

    `accumulates`: whether a rank runs several backward passes a step; whole gradients then wait for the last one.
    """
    root = shapes.decoder - shapes.layers * shapes.layer
    unit = shapes.trained // shapes.layers if shapes.lora else max(root, 2 * shapes.layer)
    of_layer = layer_numbers(shapes, width)
    if config.gradient_checkpointing:
        kept = shapes.layers * shapes.hidden + of_layer  # each layer's input, and the layer that is computed once more
    else:
        kept = shapes.layers * of_layer
    return {
        "weights gathered": width * (root + 2 * shapes.layer),
        "gradients in flight": (width + FLOAT) * unit,  # of a layer or the root, until they are summed over ranks
        "gradients kept whole": FLOAT * shapes.trained if accumulates and gpus > 1 else 0,
        "activations": width * tokens * kept,
        "log-prob chunk": 3 * FLOAT * config.logprob_chunk * shapes.vocab,
    }


def layer_numbers(shapes: Shapes, width: int) -> int:
    """Return how many numbers a token (of `width` bytes) that one decoder layer keeps for its backward pass."""
    norms = 2 * (1 + FLOAT // width) * shapes.hidden  # two norms, each its input in float32 beside the compute type
    attention = 2 * shapes.hidden + 3 * shapes.heads + 4 * shapes.kv  # input, q before and after rotation, k, v, out
    return norms + attention + shapes.hidden + 4 * shapes.mlp  # gate, its activation, up, their product


def plan(shapes: Shapes, config: BaseConfig, gpus: int, prompt_tokens: int) -> dict[str, dict[str, int]]:
    """Return {phase: {what: bytes}} of one GPU: "always", then what each phase adds."""
    phases = {"always": held(shapes, config, gpus)}
    if isinstance(config, EvalConfig):
        phases["rollout"] = rollout(shapes, config, config.batch_size, prompt_tokens)
        return phases
    if isinstance(config, GRPOConfig):
        per_rank = max(1, config.prompts_per_step // gpus)
        together = min(config.num_generations, config.completions_per_forward or config.num_generations)
        in_parts = together < config.num_generations
        row_tokens = prompt_tokens + together * config.max_completion_length
        phases["rollout"] = rollout(shapes, config, per_rank, prompt_tokens)
    else:
        per_rank = max(1, config.samples_per_step // gpus)
        in_parts = False
        row_tokens = prompt_tokens
    batch = min(config.prompts_per_forward, per_rank)
    accumulates = per_rank > batch or in_parts
    phases["update"] = update(shapes, config, batch * row_tokens, accumulates, gpus)
    return phases


def report(phases: dict[str, dict[str, int]], memory: float) -> tuple[str, bool]:
    """Return the plan as text and whether its peak is below `memory` (bytes)."""
    lines = []
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    for name, parts in phases.items():
        lines.append(f"{name:<32}{totals[name] / GIB:>8.2f} GiB")
        for what, size in parts.items():
            if size:
                lines.append(f"  {what:<30}{size / GIB:>8.2f}")
    always = totals.pop("always")
    largest = max(totals, key=totals.get)
    peak = always + totals[largest]
    fits = peak <= memory
    verdict = "fits" if fits else "doesn't fit"
    lines.append(f"peak, in {largest:<23}{peak / GIB:>8.2f} GiB of {memory / GIB:.2f}: {verdict}")
    return "\n".join(lines), fits


def main() -> None:
    """Run the command line."""
    from hov2.engine.setup import USER_ERRORS  # here: the arithmetic needs none of what it imports, PyAV included

    parser = argparse.ArgumentParser(prog="python -m hov2.tools.plan", description=__doc__.partition("\n")[0])
    parser.add_argument("config")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--memory", type=float, default=80, help="of one GPU, in GB (1e9 bytes)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    try:
        config = read_config(args.config, args.overrides)
        prompt_tokens = config.max_prompt_length
        if prompt_tokens is None:
            raise ConfigError(f"{args.config}: expected a config that has max_prompt_length, in tokens")
        name, thinker = thinker_of(config.model, Path(args.config).parent)
        shapes = shapes_of(thinker, getattr(config, "lora", None))
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
    text, fits = report(plan(shapes, config, args.gpus, prompt_tokens), args.memory * 1e9)
    gpus = "1 GPU" if args.gpus == 1 else f"{args.gpus} GPUs"
    print(f"{name}, {gpus}, prompts of {prompt_tokens} tokens; on each GPU:")
    print(text)
    print("Arithmetic (docs/memory.md), not a measurement: leave a tenth for the allocator and the libraries.")
    sys.exit(0 if fits else 1)


def thinker_of(name: str, configs: Path) -> tuple[str, nn.Module]:
    """Return (what to call it, the thinker `name` on the meta device).

    A model that a run of another config in the folder `configs` has yet to make has the sizes of the one it starts
    from. Raises ModelError for a name that stands for no sizes.
    """
    if Path(name).is_dir():
        return name, design(name, torch.bfloat16)
    origin = origin_of(name, configs)
    called = name if origin == name else f"{name} (not there yet; the sizes of {origin}, which it comes from)"
    if origin in PUBLISHED:
        return called, published_thinker(origin)
    try:
        return called, design(origin, torch.bfloat16)
    except ModelError as error:
        known = " or ".join(f"model={published}" for published in PUBLISHED)
        raise ModelError(f"{error}; for a plan, {known} will do without any file") from None


def origin_of(name: str, configs: Path) -> str:
    """Return the model that `name` comes from by the configs in a folder, the nearest that is there; or `name` itself.

    A stage's `model` is `output_dir/model` of the stage before, which is there only once that one has run.
    """
    starts = {}  # the model that a run makes -> the one that it starts from
    for path in sorted(configs.glob("*.json")):
        with suppress(ConfigError):  # other files lie there, too
            config = read_config(path)
            starts[f"{config.output_dir}/model"] = config.model
    while name in starts and not Path(name).is_dir():
        name = starts.pop(name)  # taken out, so that configs that start from each other end here
    return name


def published_thinker(name: str) -> nn.Module:
    """Return a thinker of PUBLISHED on the meta device, without any file of it."""
    with tempfile.TemporaryDirectory() as folder:
        config = Qwen2_5OmniThinkerConfig(
            **PUBLISHED[name],
            vision_start_token_id=151652,
            vision_end_token_id=151653,
        )
        config.save_pretrained(folder)
        return design(folder, torch.bfloat16)


if __name__ == "__main__":
    main()
