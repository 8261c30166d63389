"""Prompts with random media for the tiny thinker, and the plain way of computing what hov2 computes faster."""

from types import SimpleNamespace

import torch

from hov2.model.attention import use_own_parts
from hov2.model.encoder import Encoder
from hov2.model.thinker import Policy
from hov2.model.versions import media_model_of
from tests.support.helpers import tiny_tokenizer


def use_hov2_attention(thinker):
    """Gives a tiny thinker the attention and norms that `load_thinker` gives a loaded one."""
    use_own_parts(thinker)
    media_model = media_model_of(thinker)
    for tower in (media_model.visual, media_model.audio_tower):
        tower.requires_grad_(False)
    return thinker


def random_inputs(seed=0, text_length=5, frames=4, side=2, mel_frames=40, kind="video", interleaved=False, key=None):
    """What a data.InputMaker returns for a clip of `frames` frames (side x side merged tokens) and some sound."""
    g = torch.Generator().manual_seed(seed)
    token_id = tiny_tokenizer().convert_tokens_to_ids
    grid = torch.tensor([[frames // 2, 2 * side, 2 * side]])
    visual_tokens, audio_tokens = frames // 2 * side * side, ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1

    def text(n):
        return torch.randint(0, 300, (n,), generator=g).tolist()

    ids = text(3)
    if frames:
        pad = token_id("<|IMAGE|>" if kind == "image" else "<|VIDEO|>")
        ids += [token_id("<|vision_bos|>"), *[pad] * visual_tokens, token_id("<|vision_eos|>")]
    if mel_frames:
        ids += [token_id("<|audio_bos|>"), *[token_id("<|AUDIO|>")] * audio_tokens, token_id("<|audio_eos|>")]
    ids += text(text_length)
    shape = SimpleNamespace(
        visual_kind=kind if frames else None,
        grid_thw=grid if frames else None,
        second_per_grid=0.5,
        mel_frames=mel_frames,
        interleaved=interleaved,
    )
    patches = torch.randn(int(grid.prod()), 1176, generator=g) if frames else None
    input_features = torch.randn(128, mel_frames, generator=g) if mel_frames else None
    return SimpleNamespace(
        prompt_ids=torch.tensor(ids),
        pixel_values=patches,
        input_features=input_features,
        shape=shape,
        media_key=key or (seed, "clip"),
    )


def random_prompts(thinker, count=2, **kwargs):
    """`count` prompts of different lengths."""
    encoder = Encoder(thinker, torch.device("cpu"))
    return [
        encoder(random_inputs(seed=i, text_length=5 + 3 * i, mel_frames=40 + 20 * i, **kwargs)) for i in range(count)
    ]


def random_completions(groups=2, generations=3, lengths=(7, 5), seed=0):
    """(G, C) ids for each group."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 300, (generations, lengths[i]), generator=g) for i in range(groups)]


def separate_logps(thinker, inputs, completion, temperature=1.0):
    """The plain way, one row: transformers' own forward over prompt + completion with media, then log_softmax. (C,)"""
    shape = inputs.shape
    ids = torch.cat([inputs.prompt_ids, completion])[None]
    media = {}
    if shape.grid_thw is not None:
        names = (
            ("pixel_values", "image_grid_thw")
            if shape.visual_kind == "image"
            else ("pixel_values_videos", "video_grid_thw")
        )
        media = dict(zip(names, (inputs.pixel_values, shape.grid_thw)))
        if shape.visual_kind == "video":
            media["video_second_per_grid"] = torch.tensor([shape.second_per_grid])
    if inputs.input_features is not None:
        media |= {
            "input_features": inputs.input_features[None],
            "feature_attention_mask": torch.ones(1, inputs.input_features.shape[1], dtype=torch.long),
        }
    logits = thinker(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_audio_in_video=shape.interleaved, **media
    ).logits
    start = len(inputs.prompt_ids) - 1
    logps = (logits[0, start:-1] / temperature).log_softmax(-1)
    return logps.gather(-1, completion[:, None])[:, 0]


def policy_of(thinker):
    """The thinker as an (unsharded) Policy."""
    return Policy(use_hov2_attention(thinker))
