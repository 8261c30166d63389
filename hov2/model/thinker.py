"""The thinker: loading it, freezing its towers, and running its decoder.

Qwen2.5-Omni's thinker is a decoder over text, video and audio tokens, with two frozen towers that turn frames and sound
into such tokens. The modeling code is transformers' own, but for the attention (`attention.py`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

from hov2.config import EvalConfig, GRPOConfig, SFTConfig
from hov2.distributed import compute_dtype, make_mesh, rank_zero_first, shard
from hov2.model.attention import use_own_parts
from hov2.model.lora import LoRALinear, add_lora
from hov2.model.versions import checkpoint_activations, decoder_of, media_model_of
from hov2.model.weights import ModelError, fetch, heads_differ, read_weights


class Policy(nn.Module):
    """The root of FSDP: every use of the thinker's weights happens inside one call of this module.

    `policy(function, *args)` runs `function(thinker, *args)`. FSDP gathers the sharded weights when its root is called
    and reshards them after, so whatever touches parameters (embeddings, layers, lm_head) has to happen in between.
    """

    def __init__(self, thinker: Thinker):
        super().__init__()
        self.thinker = thinker

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers, each of which is sharded by itself."""
        return decoder_of(self.thinker).layers

    def forward(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Return `function(thinker, *args, **kwargs)`; tensors in its result carry gradients as usual."""
        return function(self.thinker, *args, **kwargs)


def load_thinker(name: str, dtype: torch.dtype) -> Thinker:
    """Load the thinker in `name`, whole, on the CPU, towers frozen.

    `name` is its own folder, a full Qwen2.5-Omni folder, or a hub id.

    Raises ModelError for a name that is neither a folder nor reachable, and for weights that don't fit.
    """
    thinker = design(name, dtype, own_head=has_own_head(name))
    _materialise(Policy(thinker), name, torch.device("cpu"))
    return thinker


def load_policy(
    config: SFTConfig | GRPOConfig | EvalConfig, device: torch.device, trained: bool = True, towers: bool = True
) -> Policy:
    """Load the config's model as a sharded Policy: what is trained in float32, the rest in the compute type.

    With `config.lora` only its adapters are trained. `towers` false leaves the towers out: the reference model gets
    encodings made by the policy's. No rank ever holds the whole decoder. Errors are those of `load_thinker`, and
    ConfigError for adapters on layers that there are not.
    """
    dtype = compute_dtype(config.dtype, device)
    thinker = design(config.model, dtype, towers, has_own_head(config.model))
    if not trained:
        thinker.requires_grad_(False)
    elif config.lora:
        add_lora(thinker, config.lora)
    for parameter in thinker.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    mesh = make_mesh(device, config.shard_within_node)
    policy = shard(Policy(thinker).eval(), mesh, dtype, tower_parameters(thinker))
    _materialise(policy, config.model, device, config.seed)
    return policy


def load_reference(config: GRPOConfig, device: torch.device, policy: Policy) -> Policy | None:
    """Load the model that a stage begins with, frozen, for the KL term; None where there is none (beta 0).

    With LoRA it is the policy itself, inside `adapters_off`; else a second model, without towers.
    """
    if not config.beta:
        return None
    return policy if config.lora else load_policy(config, device, trained=False, towers=False)


def has_own_head(name: str) -> bool:
    """Whether the files of `name` have an lm_head of its own though its config ties it to the embeddings.

    As in transformers, the files then have the last word. Raises ModelError as `load_thinker` does.
    """
    config = _read(AutoConfig, name)
    config = getattr(config, "thinker_config", config)
    if not getattr(config, "tie_word_embeddings", False):
        return False
    try:
        return heads_differ(fetch(name))
    except (OSError, SafetensorError) as error:
        raise ModelError(_explain(name)) from error


def design(name: str, dtype: torch.dtype, towers: bool = True, own_head: bool = False) -> Thinker:
    """Return the thinker that `name` describes on the meta device: names, shapes and types, no memory; towers frozen.

    With `own_head` the lm_head is a weight of its own, whatever the config says. Raises ModelError for a name that is
    neither a folder nor reachable, and for another kind of model.
    """
    config = _read(AutoConfig, name)
    if config.model_type not in ("qwen2_5_omni", "qwen2_5_omni_thinker"):
        raise ModelError(f"{name}: a model of the type {config.model_type!r}; expected a Qwen2.5-Omni or its thinker")
    config = getattr(config, "thinker_config", config)
    if own_head:
        config.tie_word_embeddings = False
    with torch.device("meta"):
        thinker = Thinker(config).eval()
    thinker.tie_weights()
    use_own_parts(thinker)
    if not towers:
        media_model = media_model_of(thinker)
        media_model.visual = media_model.audio_tower = None
    for parameter in thinker.parameters():
        parameter.data = parameter.data.to(dtype)
    for parameter in tower_parameters(thinker):
        parameter.requires_grad_(False)
    return thinker


def _materialise(policy: Policy, name: str, device: torch.device, seed: int = 0) -> None:
    """Give a policy, sharded or not, memory on `device`, the weights of `name`, and adapters that `seed` decides."""
    thinker = policy.to_empty(device=device).thinker
    generator = torch.Generator().manual_seed(seed)
    thinker.tie_weights()
    for module in thinker.modules():
        if isinstance(module, LoRALinear):
            module.start(generator)
        elif next(module.buffers(recurse=False), None) is not None:
            thinker._init_weights(module)  # computed instead of loaded: rotary frequencies, the audio's positions
    loaded = {}
    for key, parameter in thinker.named_parameters():
        if ".lora_" not in key:
            loaded[key] = parameter
    try:
        read_weights(loaded, fetch(name))
    except (OSError, SafetensorError) as error:
        raise ModelError(_explain(name)) from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside the model (a folder or a hub id)."""
    return _read(AutoTokenizer, name)


def _read(kind: type, name: str, **options: Any) -> Any:
    """Return `kind.from_pretrained(name)`; one process downloads, the others then find the files."""
    with rank_zero_first():
        try:
            return kind.from_pretrained(name, **options)
        except (OSError, ValueError) as error:
            raise ModelError(_explain(name)) from error


def _explain(name: str) -> str:
    """Say why the model `name` could not be read."""
    if Path(name).is_dir():
        return (
            f"{name}: the folder has no model or tokenizer that transformers can read "
            "(config.json, *.safetensors, tokenizer.json)"
        )
    hint = ""
    if Path(name).name == "model":  # as the configs of later stages have it
        hint = (
            "; a run writes its `model` folder when it ends: run the stage before this one, or start from another "
            "model, such as model=Qwen/Qwen2.5-Omni-3B"
        )
    return f"{name}: no such folder, and not to be had from the model hub (no network, or no such name){hint}"


def tower_parameters(thinker: nn.Module) -> set[nn.Parameter]:
    """Return the frozen parameters; they are kept whole on every rank."""
    media_model = media_model_of(thinker)
    parameters = set()
    for tower in (media_model.visual, media_model.audio_tower):
        if tower is not None:
            parameters.update(tower.parameters())
    return parameters


def set_training(policy: Policy, training: bool, gradient_checkpointing: bool) -> None:
    """Set train mode with activation checkpointing, or eval mode without.

    Decoding must be in eval mode: in train mode transformers' checkpointing silently drops key-value caches.
    """
    policy.train(training)
    if gradient_checkpointing:
        checkpoint_activations(policy.thinker, training)


def embed(thinker: nn.Module, ids: Tensor, visual: Tensor | None, audio: Tensor | None) -> Tensor:
    """Return token embeddings of `ids` (L,), the media tokens among them replaced by the towers' outputs: (L, D)."""
    config = thinker.config
    embeds = thinker.get_input_embeddings()(ids)
    if visual is not None:
        is_visual = (ids == config.video_token_id) | (ids == config.image_token_id)
        embeds = embeds.masked_scatter(is_visual[:, None], visual.to(embeds.dtype))
    if audio is not None:
        is_audio = ids == config.audio_token_id
        embeds = embeds.masked_scatter(is_audio[:, None], audio.to(embeds.dtype))
    return embeds


def decode(
    thinker: nn.Module,
    embeds: Tensor,
    position_ids: Tensor,
    attend: Callable[[int, Tensor, Tensor, Tensor, float], Tensor],
) -> Tensor:
    """Return hidden states (B, L, D) of the decoder on embeddings (B, L, D) at positions (3, B, L).

    `attend` is the attention, as `attention.Attention.forward` takes it. The mask comes as a dict so that transformers
    builds none: `attend` alone decides who attends to whom.
    """
    output = decoder_of(thinker)(
        inputs_embeds=embeds,
        position_ids=position_ids,
        attention_mask={"full_attention": None},
        use_cache=False,
        attend=attend,
    )
    return output.last_hidden_state
