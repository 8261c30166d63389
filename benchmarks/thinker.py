"""A random thinker and prompts with random media, shaped like Qwen2.5-Omni's and as small as a benchmark needs."""

from types import SimpleNamespace

import kit  # noqa: F401, first: it makes hov2 importable
import torch
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from hov2.model.attention import use_own_parts
from hov2.model.rollout import Sampling
from hov2.model.versions import media_model_of

NAMES = ("image", "audio", "video", "vision_bos", "vision_eos", "audio_bos", "audio_eos")


def random_thinker(vocab, layers=6, hidden=256, seed=0):
    """A thinker with random weights, float32, eval mode; towers frozen. The last rows of the vocabulary are special.

    Shaped like the 7B: two query heads to a key-value head, an MLP of four times the width, towers that cost about a
    quarter of a forward pass of the prompt.
    """
    heads, ids = hidden // 64, special_ids(vocab)
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "max_window_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 2),
            "vocab_size": vocab,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        },
        vision_config={
            "depth": 4,
            "hidden_size": hidden // 2,
            "intermediate_size": hidden,
            "num_heads": 4,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [3],
        },
        audio_config={
            "encoder_layers": 4,
            "d_model": hidden // 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 2 * hidden,
            "output_dim": hidden,
        },
        image_token_index=ids["image"],
        audio_token_index=ids["audio"],
        video_token_index=ids["video"],
        vision_start_token_id=ids["vision_bos"],
        vision_end_token_id=ids["vision_eos"],
        audio_start_token_id=ids["audio_bos"],
        audio_end_token_id=ids["audio_eos"],
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    thinker = Qwen2_5OmniThinkerForConditionalGeneration(config).eval()
    media_model = media_model_of(thinker)
    for tower in (media_model.visual, media_model.audio_tower):
        tower.requires_grad_(False)
    return thinker


def use_hov2_attention(thinker):
    """The thinker with the attention and norms that hov2 gives to a model that it loads."""
    use_own_parts(thinker)
    return thinker


def special_ids(vocab):
    """{name: id}: the last rows of the vocabulary."""
    return dict(zip(NAMES, range(vocab - len(NAMES), vocab)))


def random_inputs(vocab, video_tokens=1024, audio_tokens=375, text_tokens=160, seed=0):
    """A prompt with a random clip, with what an `Encoder` reads of `data.Inputs`; its markers add 4 tokens.

    The video has 64 tokens for each pair of frames (`video_tokens` a multiple of 64; fewer than 64 are one pair in a
    single row), the sound 25 tokens a second.
    """
    g, ids = torch.Generator().manual_seed(seed), special_ids(vocab)
    rows, columns = (16, 16) if video_tokens >= 64 else (2, 2 * video_tokens)
    grid = torch.tensor([[max(1, video_tokens // 64), rows, columns]])
    text = torch.randint(0, vocab - len(NAMES), (text_tokens,), generator=g).tolist()
    prompt = [
        *text[:8],
        ids["vision_bos"],
        *[ids["video"]] * video_tokens,
        ids["vision_eos"],
        ids["audio_bos"],
        *[ids["audio"]] * audio_tokens,
        ids["audio_eos"],
        *text[8:],
    ]
    mel_frames = 4 * audio_tokens
    shape = SimpleNamespace(
        visual_kind="video", grid_thw=grid, second_per_grid=1.0, mel_frames=mel_frames, interleaved=False
    )
    patches = torch.randn(int(grid.prod()), 1176, generator=g)
    return SimpleNamespace(
        prompt_ids=torch.tensor(prompt),
        shape=shape,
        media_key=(seed,),
        pixel_values=patches,
        input_features=torch.randn(128, mel_frames, generator=g),
    )


def random_completions(vocab, generations, length, seed=0):
    """(G, T) token ids, none of them special."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab - len(NAMES), (generations, length), generator=g)


def sampling_for(vocab, length, temperature=0.9, top_k=50):
    """Sampling that never stops before `length` tokens, so that every way decodes as many."""
    return Sampling(
        max_completion_length=length,
        stop_ids=[-1],
        pad_id=0,
        temperature=temperature,
        top_k=top_k,
        suppressed_ids=torch.tensor(list(special_ids(vocab).values())),
    )
