"""What an export is for those who load it: a thinker by itself, or a full Qwen2.5-Omni, perhaps without its talker.

Servers such as vLLM know the full model only. They and transformers' processor also want to be told how images and
sound become tensors, and what the media tokens are called, which a model made elsewhere may not say.
"""

import json
from pathlib import Path
from typing import Any

import torch

from hov2.config import MediaConfig

OMNI = "qwen2_5_omni"  # the model_type of a full checkpoint; a thinker's is qwen2_5_omni_thinker
PREFIX = "thinker."  # of the thinker's tensors in a full checkpoint
VOICES = "spk_dict.pt"  # the talker's; transformers loads no full checkpoint without the file
MEDIA_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
PREPROCESSOR = {  # as hov2.data makes tensors, but for the pixels of a frame
    "processor_class": "Qwen2_5OmniProcessor",
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "sampling_rate": 16000,
    "hop_length": 160,
    "n_fft": 400,
    "chunk_length": 300,
    "dither": 0.0,
    "return_attention_mask": True,
}


def kind_of(folder: Path) -> str:
    """Return what a model's folder holds: "thinker" or "omni"."""
    config = _read(folder / "config.json")
    return "omni" if config["model_type"] == OMNI else "thinker"


def key_in(key: str, source_kind: str, kind: str) -> str | None:
    """Return a tensor's key in an export of `kind`, from its key in the source; None for what a thinker lacks."""
    if source_kind == kind:
        return key
    if kind == "omni":
        return PREFIX + key
    if key.startswith(PREFIX):
        return key.removeprefix(PREFIX)
    return None  # of talker or vocoder


def adapt(
    folder: Path, source_kind: str, kind: str, dtype: torch.dtype, tied: bool, media: MediaConfig | None = None
) -> None:
    """Make the small files of a source, copied to `folder`, those of an export of `kind` with tensors of `dtype`.

    The config says so where the head isn't `tied` to the embeddings. With `media`, a folder that has no
    preprocessor_config.json gets one with the pixels of the run.
    """
    config = _read(folder / "config.json")
    if not tied:
        of_thinker = config["thinker_config"] if source_kind == "omni" else config
        of_thinker["tie_word_embeddings"] = False
    _write(folder / "config.json", _config_as(config, source_kind, kind, str(dtype).removeprefix("torch.")))
    if kind == "omni" and source_kind == "thinker":
        torch.save({}, folder / VOICES)
    if kind == "thinker":
        (folder / VOICES).unlink(missing_ok=True)
    preprocessor = folder / "preprocessor_config.json"
    if media and not preprocessor.exists():
        _write(preprocessor, PREPROCESSOR | {"min_pixels": media.min_pixels, "max_pixels": media.max_pixels})
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.exists():
        said = _read(tokenizer)
        if MEDIA_TOKENS.keys() - said.keys():
            _write(tokenizer, MEDIA_TOKENS | said)


def _config_as(config: dict, source_kind: str, kind: str, dtype: str) -> dict:
    """Return the config of an export of `kind`; that of a whole full one, which speaks of other parts too, stays."""
    if source_kind == "omni" and kind == "omni":
        return config
    if source_kind == "omni":
        config = config["thinker_config"] | {"architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"]}
    config = config | {"dtype": dtype}
    if kind == "thinker":
        return config
    return {
        "model_type": OMNI,
        "architectures": ["Qwen2_5OmniForConditionalGeneration"],
        "enable_audio_output": False,  # there is no talker
        "dtype": dtype,
        "thinker_config": config,
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
