"""Tiny stand-ins for the tests, made on the spot: a Qwen2 tokenizer, a Qwen2.5-Omni thinker, clips with sound."""

import functools
import json
import math

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration, Qwen2Tokenizer

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|IMAGE|>",
    "<|AUDIO|>",
    "<|VIDEO|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
]
# Enough repeated text for about a hundred merges, some of which cross a tag's edge (".</", "><"), as Qwen's own do.
CORPUS = [
    "<context>A man smiles and talks in a high voice.</context><think>He is joking.</think><answer>B</answer>",
    "<context>The video shows a red face; the tone is low.</context>\n<think>A threat.</think>\n<answer>A</answer>",
    "You are a helpful assistant. The user asks a question about the video, the image and the audio.",
    "What does the speaker intend? Options:\nA. joke\nB. threat\nC. praise\nD. plea\n",
    "system\nuser\nassistant\n",
]


@functools.lru_cache
def tiny_tokenizer(vocab_size=400):
    """A Qwen2Tokenizer whose byte-level BPE was trained on a few sentences; its special tokens come last.

    Don't change the returned object (add_tokens and the like): all tests share it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    names = {f"{kind}_token": f"<|{kind.upper()}|>" for kind in ("image", "audio", "video")}
    names |= {f"{kind}_token": f"<|{kind}|>" for kind in ("vision_bos", "vision_eos", "audio_bos", "audio_eos")}
    qwen = Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(m) for m in bpe["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=names,
    )
    qwen.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    return qwen


def tiny_thinker(seed=0, vocab=None, layers=2, hidden=64, attn_implementation="sdpa"):
    """A randomly initialised thinker for tiny_tokenizer(): float32, on the CPU, in eval mode; ~0.3 M parameters.

    `vocab` is the embedding's number of rows (default: the tokenizer's size).
    """
    tokenizer = tiny_tokenizer()
    token_id = tokenizer.convert_tokens_to_ids
    heads = 4
    half = hidden // heads // 2  # mrope_section must sum to half of the head's size
    sections = [half // 2, half // 4, half - half // 2 - half // 4]
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "max_window_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 2,
            "vocab_size": vocab or len(tokenizer),
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections},
            "bos_token_id": None,
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        audio_config={
            "encoder_layers": 2,
            "d_model": 32,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "output_dim": hidden,
            "num_mel_bins": 128,
        },
        image_token_index=token_id("<|IMAGE|>"),
        audio_token_index=token_id("<|AUDIO|>"),
        video_token_index=token_id("<|VIDEO|>"),
        vision_start_token_id=token_id("<|vision_bos|>"),
        vision_end_token_id=token_id("<|vision_eos|>"),
        audio_start_token_id=token_id("<|audio_bos|>"),
        audio_end_token_id=token_id("<|audio_eos|>"),
        tie_word_embeddings=False,
    )
    config._attn_implementation = attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5OmniThinkerForConditionalGeneration(config).eval()


def synth_clip(path, seconds=1, fps=8, size=56, sound=True, seed=0):
    """Writes a clip with PyAV and returns its path as text; the ending decides what it is.

    .mp4 (h264 + aac) and .webm (vp9 + opus): a square that moves over a colour ramp, with a tone where `sound`;
    .wav: the tone alone; .png: the first frame alone.
    """
    import av  # here: the tests of CUDA run without it

    path = str(path)
    frames, tone = _frames(round(seconds * fps), size, seed), _tone(seconds, seed)
    if path.endswith(".png"):
        frames, sound = frames[:1], False
    video_codec, audio_codec = {
        ".mp4": ("libx264", "aac"),
        "webm": ("libvpx-vp9", "libopus"),
        ".wav": (None, "pcm_s16le"),
        ".png": ("png", None),
    }[path[-4:]]
    with av.open(path, "w", format="image2" if path.endswith(".png") else None) as container:
        video = container.add_stream(video_codec, rate=fps) if video_codec else None
        audio = container.add_stream(audio_codec, rate=48000, layout="mono") if sound else None
        if video:
            video.width = video.height = size
            video.pix_fmt = "rgb24" if video_codec == "png" else "yuv420p"
            for image in frames:
                container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(video.encode())
        if audio:
            frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
            frame.sample_rate = 48000
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path


def _frames(count, size, seed):
    """Uint8 (size, size, 3) images: red grows with x, blue with y, a green square moves to the right."""
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    green = np.full((size, size), 40 * (seed % 5), np.uint8)
    background = np.stack([np.tile(ramp, (size, 1)), green, np.tile(ramp[:, None], (1, size))], -1)
    images = []
    for i in range(count):
        image, side = background.copy(), size // 4
        left = (i * size // max(count, 1)) % (size - side)
        image[size // 2 : size // 2 + side, left : left + side] = (0, 255, 0)
        images.append(np.ascontiguousarray(image))
    return images


def _tone(seconds, seed):
    """Int16 (N,) at 48 kHz: a sine of 220 Hz times (1 + seed)."""
    times = np.arange(round(seconds * 48000)) / 48000
    return (8000 * np.sin(2 * math.pi * 220 * (1 + seed) * times)).astype(np.int16)
