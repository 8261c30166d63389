"""How much memory a training run needs on each GPU, before one is bought: `python -m hov2.tools.plan CONFIG`.

    python -m hov2.tools.plan configs/stage2.json --gpus 8 --memory 80 [key=value ...]

Arithmetic on the model's shapes (no weight is read) and on the config; docs/memory.md has the formulas. What a run
holds all the time and what a phase adds are kept apart: the peak is the largest phase. Exit code 1 if it doesn't fit.
"""

import argparse
import sys
import tempfile
from types import SimpleNamespace

import torch
from transformers import Qwen2_5OmniThinkerConfig

from hov2.config import ConfigError, EvalConfig, GRPOConfig
from hov2.config_io import read_config
from hov2.model.lora import add_lora
from hov2.model.thinker import design, tower_parameters
from hov2.model.versions import decoder_of
from hov2.model.weights import ModelError

GIB = 2**30
FLOAT = 4  # bytes of a trained weight, of its gradient as it is summed over ranks, and of a logit


def shapes_of(thinker, lora=None):
    """What the formulas need of a thinker, which may be on the meta device, with the adapters of a LoRAConfig or none.

    Numbers of weights: decoder (embeddings, layers and head, without adapters), layer (one of the decoder's), trained
    (all of the decoder's, or those of the adapters), towers. Sizes: layers, hidden, heads (query heads x head size), kv
    (key-value heads x head size), mlp, vocab. And lora: whether adapters are trained instead of the weights.
    """
    towers, text = tower_parameters(thinker), thinker.config.get_text_config()
    decoder = sum(p.numel() for p in thinker.parameters() if p not in towers)
    layer = sum(p.numel() for p in decoder_of(thinker).layers[0].parameters())
    if lora:
        add_lora(thinker, lora)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return SimpleNamespace(
        decoder=decoder, layer=layer, trained=sum(p.numel() for p in thinker.parameters() if p.requires_grad),
        towers=sum(p.numel() for p in towers), layers=text.num_hidden_layers, hidden=text.hidden_size,
        heads=text.num_attention_heads * head_size, kv=text.num_key_value_heads * head_size,
        mlp=text.intermediate_size, vocab=text.vocab_size, lora=lora is not None)


def held(shapes, config, gpus, width=2):
    """{what: bytes} that a GPU holds all the time; `width`: bytes of a number in the compute type."""
    states = 0 if config.optimizer_states == "cpu" else 2 * FLOAT
    frozen = width * shapes.decoder if shapes.lora else 0
    return {
        "weights": (frozen + FLOAT * shapes.trained) // gpus,
        "gradients": FLOAT * shapes.trained // gpus,
        "optimizer": states * shapes.trained // gpus,
        "reference": width * shapes.decoder // gpus if getattr(config, "beta", 0) and not shapes.lora else 0,
        "towers": width * shapes.towers,
    }


def rollout(shapes, config, prompts, prompt_tokens, width=2):
    """{what: bytes} that decoding `prompts` groups together adds: all weights gathered, and keys and values."""
    rows = prompts * config.num_generations
    return {"weights gathered": width * shapes.decoder,
            "stacked projections": width * shapes.layers * shapes.hidden * (shapes.heads + 2 * shapes.kv),
            "prefill": width * prompt_tokens * (4 * shapes.hidden + 3 * shapes.mlp),  # of one prompt, one layer
            "KV cache": kv_bytes(shapes, prompts * prompt_tokens + rows * config.max_completion_length, width),
            "logits": 3 * FLOAT * rows * shapes.vocab}


def kv_bytes(shapes, tokens, width=2):
    """Bytes of the keys and values of `tokens` tokens, in all layers."""
    return shapes.layers * 2 * shapes.kv * tokens * width


def update(shapes, config, tokens, accumulates, gpus, width=2):
    """{what: bytes} that forward and backward over a row of `tokens` tokens add.

    `accumulates`: whether a rank runs several backward passes a step; whole gradients then wait for the last one.
    """
    root = shapes.decoder - shapes.layers * shapes.layer
    unit = shapes.trained // shapes.layers if shapes.lora else max(root, 2 * shapes.layer)
    kept = shapes.layers * (shapes.hidden if config.gradient_checkpointing else layer_numbers(shapes, width))
    again = layer_numbers(shapes, width) if config.gradient_checkpointing else 0  # the layer that is computed once more
    return {
        "weights gathered": width * (root + 2 * shapes.layer),
        "gradients in flight": (width + FLOAT) * unit,  # of a layer or the root, until they are summed over ranks
        "gradients kept whole": FLOAT * shapes.trained if accumulates and gpus > 1 else 0,
        "activations": width * tokens * (kept + again),
        "log-prob chunk": 3 * FLOAT * config.logprob_chunk * shapes.vocab,
    }


def layer_numbers(shapes, width):
    """Numbers a token (of `width` bytes) that one decoder layer keeps for its backward pass."""
    norms = 2 * (1 + FLOAT // width) * shapes.hidden  # two norms, each its input in float32 beside the compute type
    attention = 2 * shapes.hidden + 3 * shapes.heads + 4 * shapes.kv  # input, q before and after rotation, k, v, out
    return norms + attention + shapes.hidden + 4 * shapes.mlp  # gate, its activation, up, their product


def plan(shapes, config, gpus, prompt_tokens):
    """{phase: {what: bytes}} of one GPU: "always", then what each phase adds."""
    grpo = isinstance(config, GRPOConfig)
    per_rank = max(1, (config.prompts_per_step if grpo else config.samples_per_step) // gpus)
    batch = min(config.per_device_train_batch_size, per_rank)
    generations = config.num_generations if grpo else 0
    together = min(generations, getattr(config, "completions_per_forward", None) or generations)
    completion = together * config.max_completion_length if grpo else 0
    phases = {"always": held(shapes, config, gpus)}
    if grpo:
        phases["rollout"] = rollout(shapes, config, per_rank, prompt_tokens)
    accumulates = per_rank > batch or together < generations
    phases["update"] = update(shapes, config, batch * (prompt_tokens + completion), accumulates, gpus)
    return phases


def report(phases, memory):
    """The plan as text and whether its peak is below `memory` (bytes)."""
    lines, totals = [], {name: sum(parts.values()) for name, parts in phases.items()}
    for name, parts in phases.items():
        lines.append(f"{name:<32}{totals[name] / GIB:>8.2f} GiB")
        lines += [f"  {what:<30}{size / GIB:>8.2f}" for what, size in parts.items() if size]
    always = totals.pop("always")
    peak, worst = max((always + total, name) for name, total in totals.items())
    lines.append(f"peak, in {worst:<23}{peak / GIB:>8.2f} GiB of {memory / GIB:.2f}: "
                 + ("fits" if peak <= memory else "doesn't fit"))
    return "\n".join(lines), peak <= memory


def main():
    """The command line."""
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
        if isinstance(config, EvalConfig) or prompt_tokens is None:
            raise ConfigError(f"{args.config}: expected a training config that has max_prompt_length, in tokens")
        name, thinker = thinker_of(config.model)
        shapes = shapes_of(thinker, config.lora)
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
    text, fits = report(plan(shapes, config, args.gpus, prompt_tokens), args.memory * 1e9)
    print(f"{name}, {args.gpus} GPU{'s' * (args.gpus > 1)}, prompts of {prompt_tokens} tokens; on each GPU:\n{text}\n"
          "Arithmetic (docs/memory.md), not a measurement: leave a tenth for the allocator and the libraries.")
    sys.exit(0 if fits else 1)


def thinker_of(name):
    """(what to call it, the thinker `name` on the meta device); that of the 7B model where `name` isn't to be had."""
    try:
        return name, design(name, torch.bfloat16)
    except ModelError:
        return f"{name} (not there; the sizes of Qwen2.5-Omni-7B)", thinker_of_7b()


def thinker_of_7b():
    """The thinker of Qwen2.5-Omni-7B on the meta device, whose sizes transformers knows."""
    with tempfile.TemporaryDirectory() as folder:
        config = Qwen2_5OmniThinkerConfig(vision_config={"hidden_size": 1280}, vision_start_token_id=151652,
                                          vision_end_token_id=151653)  # all else is the default
        config.save_pretrained(folder)
        return design(folder, torch.bfloat16)


if __name__ == "__main__":
    main()
