"""The thinker: loading it, encoding a prompt's media once, and running its decoder with an attention of our choice.

Qwen2.5-Omni's thinker is a decoder over text, video and audio tokens, with two frozen towers that turn frames and sound
into such tokens. The modeling code is transformers' own. Two things are added from outside, through its public
interfaces: `Encoder` runs the towers once per clip, and an attention function that lets the caller say who attends to
whom (`prefix.py` for training, `rollout.py` for decoding).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoTokenizer,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.utils import cached_file, logging

from hov2.distributed import compute_dtype, rank, rank_zero_first, shard

ATTENTION = "hov2"  # our name in transformers' attention interface


class ModelError(ValueError):
    """A model that can't be loaded; the message names it and says what would be right."""


def attention(module, query, key, value, attention_mask, scaling=None, attend=None, **kwargs):
    """transformers' attention call; `attend(layer, query, key, value, scale)` replaces it when the caller passes one.

    query (B, heads, L, head_dim), key and value (B, kv heads, L, head_dim), after the rotary embedding.
    """
    if attend is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return attend(module.layer_idx, query, key, value, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])  # else padding masks are silently lost


class Policy(nn.Module):
    """The root of FSDP: every use of the thinker's weights happens inside one call of this module.

    `policy(function, *args)` runs `function(thinker, *args)`. FSDP gathers the sharded weights when its root is called
    and reshards them after, so whatever touches parameters (embeddings, layers, lm_head) has to happen in between.
    """

    def __init__(self, thinker):
        super().__init__()
        self.thinker = thinker

    def forward(self, function, *args, **kwargs):
        """Returns `function(thinker, *args, **kwargs)`; tensors in its result carry gradients as usual."""
        return function(self.thinker, *args, **kwargs)


def load_thinker(name, dtype, towers=True):
    """The thinker in `name`: its own folder, a full Qwen2.5-Omni folder (its `thinker.` part), or a hub id.

    Weights are `dtype`, towers frozen (and left out when `towers` is false: the reference model gets encodings made by
    the policy's). Raises ModelError for a name that is neither a folder nor reachable.
    """
    if rank() != 0:
        logging.disable_progress_bar()
    kind = _read(AutoConfig, name).model_type
    if kind not in ("qwen2_5_omni", "qwen2_5_omni_thinker"):
        raise ModelError(f"{name}: a model of the type {kind!r}; expected a Qwen2.5-Omni or its thinker")
    thinker, found = _read(Qwen2_5OmniThinkerForConditionalGeneration, name, dtype=dtype, output_loading_info=True)
    absent = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if absent:  # transformers would go on with random weights
        raise ModelError(f"{name}: {len(absent)} of the thinker's weights are missing or misshapen: {absent[0]}, ...")
    thinker.model.language_model.set_attn_implementation(ATTENTION)  # the towers keep theirs
    if not towers:
        thinker.model.visual = thinker.model.audio_tower = None
    for tower in filter(None, (thinker.model.visual, thinker.model.audio_tower)):
        tower.requires_grad_(False)
    return thinker


def load_policy(config, device, trained=True, towers=True):
    """The config's model as a sharded Policy: float32 weights when they are trained, else in the compute type."""
    dtype = compute_dtype(config.dtype, device)
    thinker = load_thinker(config.model, torch.float32 if trained else dtype, towers)
    if not trained:
        thinker.requires_grad_(False)
    return shard(Policy(thinker).eval(), device, dtype, tower_parameters(thinker))


def load_tokenizer(name):
    """The tokenizer beside the model (a folder or a hub id)."""
    return _read(AutoTokenizer, name)


def _read(kind, name, **options):
    """`kind.from_pretrained(name)`; one process downloads, the others then find the files."""
    with rank_zero_first():
        try:
            return kind.from_pretrained(name, **options)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(_explain(name)) from error


def source_folder(name):
    """The folder of a model's files: `name` itself, or where the hub's files were put."""
    return Path(name) if Path(name).is_dir() else Path(cached_file(name, "config.json")).parent


def _explain(name):
    if Path(name).is_dir():
        return (f"{name}: the folder has no model or tokenizer that transformers can read "
                "(config.json, *.safetensors, tokenizer.json)")
    return f"{name}: no such folder, and not to be had from the model hub (no network, or no such name)"


def tower_parameters(thinker):
    """The frozen parameters, as a set; they are kept whole on every rank."""
    towers = (thinker.model.visual, thinker.model.audio_tower)
    return {p for tower in towers if tower is not None for p in tower.parameters()}


def set_training(policy, training, gradient_checkpointing):
    """Train mode with activation checkpointing, or eval mode without.

    Decoding must be in eval mode: in train mode transformers' checkpointing silently drops key-value caches.
    """
    policy.train(training)
    if gradient_checkpointing and training:
        policy.thinker.activation_checkpointing_enable({"use_reentrant": False})
    elif gradient_checkpointing:
        policy.thinker.activation_checkpointing_disable()


@dataclass
class Prompt:
    """A prompt ready for the decoder: token ids, 3-D positions and the towers' outputs for the media tokens among them.

    The token embeddings are looked up at each forward pass, since they are trained; the towers are frozen, so theirs
    are not.
    """

    ids: torch.Tensor  # (P,)
    position_ids: torch.Tensor  # (3, P): temporal, height, width
    visual: torch.Tensor | None  # (visual tokens, D)
    audio: torch.Tensor | None  # (audio tokens, D)

    @property
    def next_position(self):
        """The position of the first token after the prompt, the same on all three axes."""
        return self.position_ids.max() + 1


class Encoder:
    """Turns `data.Inputs` into a `Prompt`, running each tower once per clip.

    `cache_size` clips' tower outputs are kept (the first ones seen stay), exact because the towers are frozen;
    `known[media_key]` tells `data.make_inputs` that a clip need not be decoded again.
    """

    def __init__(self, thinker, device, cache_size=0):
        self.thinker, self.device, self.cache_size = thinker, device, cache_size
        self.known, self._features = {}, {}

    @torch.no_grad()
    def __call__(self, inputs):
        """Inputs (CPU tensors) -> Prompt on the device. Tower outputs equal those of transformers' own forward."""
        if inputs.media_key in self._features:
            visual, audio = self._features[inputs.media_key]
        else:
            visual, audio = self._visual(inputs), self._audio(inputs)
            if len(self._features) < self.cache_size:
                self._features[inputs.media_key] = visual, audio
                self.known[inputs.media_key] = inputs.shape
        return Prompt(inputs.prompt_ids.to(self.device), self._positions(inputs).to(self.device), visual, audio)

    def _visual(self, inputs):
        if inputs.pixel_values is None:
            return None
        model = self.thinker.model
        features = model.get_image_features if inputs.shape.visual_kind == "image" else model.get_video_features
        output = features(inputs.pixel_values.to(self.device), inputs.shape.grid_thw.to(self.device))
        return output.pooler_output[0]

    def _audio(self, inputs):
        if inputs.mel is None:
            return None
        mel = inputs.mel.to(self.device, self.thinker.model.audio_tower.dtype)[None]
        mask = torch.ones(mel.shape[0], mel.shape[2], dtype=torch.long, device=self.device)
        return self.thinker.model.get_audio_features(mel, mask).last_hidden_state

    def _positions(self, inputs):
        """3-D rotary positions (3, P). On the CPU: transformers walks over the tokens in Python."""
        shape, ids = inputs.shape, inputs.prompt_ids[None]
        video = shape.grid_thw if shape.visual_kind == "video" else None
        positions, _ = self.thinker.model.get_rope_index(
            ids,
            shape.grid_thw if shape.visual_kind == "image" else None,
            video,
            torch.ones_like(ids),
            shape.interleaved,
            torch.tensor([shape.mel_frames]) if shape.mel_frames else None,
            torch.tensor([shape.second_per_grid]) if video is not None else None,
        )
        return positions[:, 0]


def embed(thinker, ids, visual, audio):
    """Token embeddings of `ids` (L,), the media tokens among them replaced by the towers' outputs: (L, D)."""
    config = thinker.config
    embeds = thinker.get_input_embeddings()(ids)
    if visual is not None:
        is_visual = (ids == config.video_token_id) | (ids == config.image_token_id)
        embeds = embeds.masked_scatter(is_visual[:, None], visual.to(embeds.dtype))
    if audio is not None:
        embeds = embeds.masked_scatter((ids == config.audio_token_id)[:, None], audio.to(embeds.dtype))
    return embeds


def decode(thinker, embeds, position_ids, attend):
    """Hidden states (B, L, D) of the decoder on embeddings (B, L, D) at positions (3, B, L), with attention `attend`.

    The mask comes as a dict so that transformers builds none: `attend` alone decides who attends to whom.
    """
    return thinker.model.language_model(
        inputs_embeds=embeds, position_ids=position_ids, attention_mask={"full_attention": None}, use_cache=False,
        attend=attend,
    ).last_hidden_state
