"""Where a GRPO step's FLOPs go, at the 7B's size or another, for the three ways of grpo_step.py. Arithmetic, no run.

    python benchmarks/flops.py                         32 frames of 128 tokens a pair, 45 s of sound, G=8, T=600
    python benchmarks/flops.py --iterations 2 --completion-tokens 1024

Counted are matrix products, a multiply-add as 2: the linear layers of towers, decoder and head, and the decoder's causal
attention. A backward pass is two forwards, and one more with activation checkpointing; hov2's log-probs compute their
logits once more in the backward pass. Decoding has few FLOPs: it is bound by reading the weights, which the last line
counts.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import kit
import torch
from torch import nn
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from hov2.model.versions import decoder_of, media_model_of

WAYS = ("released", "batched", "hov2")
TERA = 1e12


@dataclass(frozen=True)
class Units:
    """FLOPs of one thinker."""

    token: int  # a token through the decoder's linear layers
    pair: int  # a query's attention to one key, in all layers
    head: int  # a position through the head
    towers: int  # the prompt's media through both towers


def causal(n):
    """Pairs of n tokens' causal attention, each with itself and those before."""
    return n * (n + 1) // 2


def step_flops(units, prompt, tokens, generations, iterations):
    """{way: {phase: FLOPs}} of one step on one prompt of `prompt` tokens with completions of `tokens` tokens."""
    p, t, g = prompt, tokens, generations
    one = units.token * (p + t) + units.pair * causal(p + t)  # a row [prompt | completion]
    group = units.token * (p + g * t) + units.pair * (causal(p) + g * (t * p + causal(t)))  # the prompt shared
    prefill = units.token * p + units.pair * causal(p)
    decode = g * (units.token * (t - 1) + units.pair * ((t - 1) * p + causal(t - 1)))
    scored = iterations + 1 + (iterations > 1)  # passes of the other ways: reference, old, policy
    found = {}
    for way, positions in (("released", p + t), ("batched", t)):
        head = g * units.head * positions
        found[way] = {
            "towers": g * units.towers * (1 + scored),
            "prefill": g * (prefill + units.head * p),  # transformers' thinker projects every position
            "decode": decode + g * units.head * (t - 1),
            "reference": g * one + head,
            "old": (iterations > 1) * (g * one + head),
            "forward": iterations * (g * one + head),
            "backward": iterations * (3 * g * one + 2 * head),
        }
    head = g * units.head * t
    found["hov2"] = {
        "towers": units.towers,
        "prefill": prefill,
        "decode": decode + head,
        "reference": group + head,
        "old": 0,
        "forward": iterations * (group + head),
        "backward": iterations * 3 * (group + head),
    }
    return found


def linear_weights(module):
    """Numbers of weights that take part in matrix products."""
    kinds = nn.Linear, nn.Conv1d, nn.Conv3d
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, kinds))


def units_of(config, video_tokens, audio_tokens):
    """The Units of a thinker's config; the towers' for a prompt with so many media tokens."""
    with torch.device("meta"):
        model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    text, merge = config.get_text_config(), config.vision_config.spatial_merge_size**2
    visual, audio = media_model_of(model).visual, media_model_of(model).audio_tower
    merger = linear_weights(visual.merger)  # works on groups of `merge` patches
    towers = video_tokens * (merge * (linear_weights(visual) - merger) + merger)
    towers += 2 * audio_tokens * linear_weights(audio)  # positions are pooled by two at its end
    heads = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    return Units(
        token=2 * linear_weights(decoder_of(model)),
        pair=4 * heads * text.num_hidden_layers,
        head=2 * model.lm_head.weight.numel(),
        towers=2 * towers,
    )


def print_phases(found, generations):
    """The phases' TFLOP, and their ratios."""
    rows = []
    for phase in [*found["hov2"], "total"]:
        values = [sum(found[way].values()) if phase == "total" else found[way][phase] for way in WAYS]
        ours = values[-1]
        rows.append(
            [phase, *(value / TERA for value in values), *(value / ours if ours else None for value in values[:-1])]
        )
    kit.print_table(["TFLOP", *WAYS, "released / hov2", "batched / hov2"], rows)
    print(f"decoding reads all weights {generations} times a token the released way, once the two others")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(prog="python benchmarks/flops.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, help="config.json of a thinker; default: the 7B's sizes")
    parser.add_argument("--video-tokens", type=int, default=2048)
    parser.add_argument("--audio-tokens", type=int, default=1125)
    parser.add_argument("--text-tokens", type=int, default=350)
    parser.add_argument("--completion-tokens", type=int, default=600)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=1)
    args = parser.parse_args(argv)
    settings = json.loads(args.config.read_text()) if args.config else {}
    config = Qwen2_5OmniThinkerConfig(**(settings or {"vision_config": {"hidden_size": 1280}}))  # else defaults are its
    units = units_of(config, args.video_tokens, args.audio_tokens)
    prompt = args.video_tokens + args.audio_tokens + args.text_tokens
    found = step_flops(units, prompt, args.completion_tokens, args.generations, args.iterations)
    print(f"P={prompt}, T={args.completion_tokens}, G={args.generations}, {args.iterations} iterations")
    print_phases(found, args.generations)


if __name__ == "__main__":
    main()
