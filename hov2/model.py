"""The thinker: loading it, encoding a prompt's media once, and running its decoder with an attention of our choice.

Qwen2.5-Omni's thinker is a decoder over text, video and audio tokens, with two frozen towers that turn frames and sound
into such tokens. The modeling code is transformers' own. Two things are added from outside: `Encoder` runs the towers
once per clip, and an attention that lets the caller say who attends to whom (`prefix.py` for training, `rollout.py` for
decoding).
"""

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AutoConfig, AutoTokenizer
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAttention

from hov2.config import ConfigError
from hov2.distributed import compute_dtype, make_mesh, rank_zero_first, shard
from hov2.weights import ModelError, fetch, fill, read_weights, whole

TOWER_ATTENTION = "hov2_flash"  # with "flash" in it, transformers hands over all windows at once instead of one by one


class Attention(Qwen2_5OmniAttention):
    """transformers' attention of a decoder layer, whose caller may say who attends to whom."""

    stacked = None  # within `stacked_projections`: weight and bias of query, key and value, one below the other

    def forward(self, hidden_states, *args, position_embeddings=None, attend=None, **kwargs):
        """`attend(layer, query, key, value, scale)`, if there is one, takes the place of transformers' own.

        query (B, heads, L, hd), key and value (B, kv heads, L, hd), after the rotary embedding.
        """
        if attend is None:
            return super().forward(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        heads, kv_heads = self.num_heads, self.num_key_value_heads
        projected = self._project(hidden_states).unflatten(-1, (-1, self.head_dim))  # (B, L, heads + 2 kv heads, hd)
        turned, value = projected.split([heads + kv_heads, kv_heads], 2)
        query, key = rotated(turned, *position_embeddings).split([heads, kv_heads], 2)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        attended = attend(self.layer_idx, query, key, value, self.scaling)
        return self.o_proj(attended.transpose(1, 2).flatten(2)), None

    def _project(self, hidden_states):
        """Query, key and value beside each other, (B, L, (heads + 2 kv heads) * hd)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if self.stacked is None:
            return torch.cat([project(hidden_states) for project in projections], -1)
        rows = hidden_states.flatten(0, -2)
        out = nn.functional.linear(rows, *self.stacked)
        for project, columns in zip(projections, out.split([len(p.weight) for p in projections], -1)):
            if isinstance(project, LoRALinear):
                project.correct(columns, rows)
        return out.view(*hidden_states.shape[:-1], -1)


@contextmanager
def stacked_projections(thinker, wanted=True):
    """Inside, query, key and value are one product, of a copy of their weights: fewer kernels, each with more to do.

    For decoding on CUDA, where that is a tenth of the time; weights must be whole (`distributed.unsharded`) and stay.
    """
    attentions = [layer.self_attn for layer in decoder_of(thinker).layers] if wanted else []
    try:
        for attention in attentions:
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            attention.stacked = tuple(torch.cat([getattr(project, name).detach() for project in projections])
                                      for name in ("weight", "bias"))
        yield
    finally:
        for attention in attentions:
            attention.stacked = None


def rotated(x, cos, sin):
    """The rotary embedding of x (B, L, heads, hd): x cos + (-second half, first half) sin, in as few kernels as can be.

    cos, sin (B, L, hd), as transformers' rotary embedding gives them.
    """
    first, second = x.chunk(2, -1)
    first_sin, second_sin = sin[:, :, None].chunk(2, -1)
    first_cos, second_cos = (x * cos[:, :, None]).chunk(2, -1)
    return torch.cat([torch.addcmul(first_cos, second, first_sin, value=-1),
                      torch.addcmul(second_cos, first, second_sin)], -1)


def tower_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None,
                    **kwargs):
    """A tower's attention within windows that stand one after the other: query, key, value (1, heads, L, hd).

    cu_seq_lens_q: where each window starts, and the end of the last. Returns (1, L, heads, hd), as transformers wants.
    """
    if query.is_cuda and query.dtype != torch.float32:  # one kernel for windows of all lengths
        rows = (x[0].transpose(0, 1) for x in (query, key, value))
        bounds = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
        return varlen_attn(*rows, *bounds, scale=scaling)[None], None
    parts, start, lengths = [], 0, cu_seq_lens_q.diff().tolist()
    for length, run in groupby(lengths):  # windows of equal length that follow each other: one batch
        windows = len(list(run))
        here = slice(start, start + windows * length)
        batch = (x[0, :, here].unflatten(1, (windows, length)).transpose(0, 1) for x in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(*batch, scale=scaling)  # (windows, heads, length, hd)
        parts.append(out.transpose(1, 2).flatten(0, 1))
        start = here.stop
    return torch.cat(parts)[None], None


AttentionInterface.register(TOWER_ATTENTION, tower_attention)


# ---- What differs between transformers 5.17 and 5.23 -----------------------------------------------------------------
# Since 5.21 decoder and towers are in `thinker.model`; before that the thinker has the towers itself, and its `model`
# is the decoder. The names of parameters differ likewise: `weights.thinker_name` gives the newer ones.


def decoder_of(thinker):
    """The decoder: embeddings, layers and final norm, without the head."""
    return getattr(thinker.model, "language_model", thinker.model)


def media_model_of(thinker):
    """The module that has the towers (`visual`, `audio_tower`) and the functions that use them."""
    return thinker.model if hasattr(thinker.model, "visual") else thinker


def checkpoint_activations(thinker, on):
    """Whether the decoder's layers compute their activations again in the backward pass instead of keeping them."""
    kind = "activation" if hasattr(thinker, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(thinker, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(thinker, f"{kind}_checkpointing_disable")()


# ---- The policy and its adapters -------------------------------------------------------------------------------------


class Policy(nn.Module):
    """The root of FSDP: every use of the thinker's weights happens inside one call of this module.

    `policy(function, *args)` runs `function(thinker, *args)`. FSDP gathers the sharded weights when its root is called
    and reshards them after, so whatever touches parameters (embeddings, layers, lm_head) has to happen in between.
    """

    def __init__(self, thinker):
        super().__init__()
        self.thinker = thinker

    @property
    def layers(self):
        """The decoder's layers, each of which is sharded by itself."""
        return decoder_of(self.thinker).layers

    def forward(self, function, *args, **kwargs):
        """Returns `function(thinker, *args, **kwargs)`; tensors in its result carry gradients as usual."""
        return function(self.thinker, *args, **kwargs)


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained correction of low rank: W x + b + alpha / rank * B A x (Hu et al., 2021).

    It has the names of the layer that it replaces, `weight` and `bias`, and adds `lora_a` (rank, in), `lora_b` (out,
    rank), float32. B begins at 0: the layer then does what it did before.
    """

    on = True  # of all layers alike: `adapters_off`

    def __init__(self, linear, config):
        super().__init__()
        self.weight, self.bias, device = linear.weight, linear.bias, linear.weight.device
        self.lora_a = nn.Parameter(torch.empty(config.rank, linear.in_features, device=device))
        self.lora_b = nn.Parameter(torch.empty(linear.out_features, config.rank, device=device))
        self.scale = config.alpha / config.rank

    def forward(self, x):
        """(..., in) -> (..., out)."""
        rows = x.flatten(0, -2)
        out = nn.functional.linear(rows, self.weight, self.bias)
        self.correct(out, rows)
        return out.view(*x.shape[:-1], -1)

    def correct(self, out, rows):
        """Adds the correction for `rows` (N, in) to `out` (N, out), in place: two kernels."""
        if self.on:
            out.addmm_(rows @ self.lora_a.T, self.lora_b.T, alpha=self.scale)

    def merged_weight(self):
        """The weight with the correction in it, whole, in float32; all ranks call it."""
        return whole(self.weight).float() + self.scale * (whole(self.lora_b) @ whole(self.lora_a))

    def start(self, generator):
        """A as torch begins a linear layer, drawn whole on every rank, so that all agree on it; B is 0."""
        first = torch.empty(self.lora_a.shape)
        fill(self.lora_a, nn.init.kaiming_uniform_(first, a=5**0.5, generator=generator))
        nn.init.zeros_(self.lora_b)


def use_own_parts(thinker):
    """Gives a thinker the attention above, and torch's own norms: one kernel on CUDA instead of eight.

    transformers writes a norm out in single operations, and rounds before its product with the weight, torch after it;
    in float32 both are the same.
    """
    decoder, media_model = decoder_of(thinker), media_model_of(thinker)
    for layer in decoder.layers:
        layer.self_attn.__class__ = Attention  # the same weights under the same names, another `forward`
    for tower in (media_model.visual, media_model.audio_tower):
        tower.config._attn_implementation = TOWER_ATTENTION  # the setter would look for a package of that name
    norms = [(parent, name, child) for parent in decoder.modules() for name, child in parent.named_children()
             if type(child).__name__.endswith("RMSNorm")]
    for parent, name, norm in norms:
        fused = nn.RMSNorm(norm.weight.shape[0], norm.variance_epsilon, device="meta")
        fused.weight = norm.weight
        setattr(parent, name, fused)


def add_lora(thinker, config):
    """Freezes the thinker and gives the decoder's linear layers named in `config.target_modules` their LoRALinear."""
    thinker.requires_grad_(False)
    layers = [(parent, name, child) for parent in decoder_of(thinker).layers.modules()
              for name, child in parent.named_children() if isinstance(child, nn.Linear)]
    known = {name for _, name, _ in layers}
    if not known.issuperset(config.target_modules):
        raise ConfigError(f"lora.target_modules: expected some of {sorted(known)}, got {config.target_modules}")
    for parent, name, child in layers:
        if name in config.target_modules:
            setattr(parent, name, LoRALinear(child, config))


@contextmanager
def adapters_off():
    """Inside, a model with LoRA is the one that it began as; nothing changes for one without."""
    LoRALinear.on = False
    try:
        yield
    finally:
        LoRALinear.on = True


def load_thinker(name, dtype):
    """The thinker in `name`, whole, on the CPU, towers frozen: its own folder, a full Qwen2.5-Omni folder, or a hub id.

    Raises ModelError for a name that is neither a folder nor reachable, and for weights that don't fit.
    """
    thinker = design(name, dtype)
    _materialise(Policy(thinker), name, torch.device("cpu"))
    return thinker


def load_policy(config, device, trained=True, towers=True):
    """The config's model as a sharded Policy: what is trained in float32, the rest in the compute type.

    With `config.lora` only its adapters are trained. `towers` false leaves the towers out: the reference model gets
    encodings made by the policy's. No rank ever holds the whole decoder. Errors are those of `load_thinker`, and
    ConfigError for adapters on layers that there are not.
    """
    dtype = compute_dtype(config.dtype, device)
    thinker = design(config.model, dtype, towers)
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


def load_reference(config, device, policy):
    """The model that a stage begins with, frozen, for the KL term; None where there is none (beta 0).

    With LoRA it is the policy itself, inside `adapters_off`; else a second model, without towers.
    """
    if not config.beta:
        return None
    return policy if config.lora else load_policy(config, device, trained=False, towers=False)


def design(name, dtype, towers=True):
    """The thinker that `name` describes on the meta device: names, shapes and types, and no memory; towers frozen.

    Raises ModelError for a name that is neither a folder nor reachable, and for another kind of model.
    """
    config = _read(AutoConfig, name)
    if config.model_type not in ("qwen2_5_omni", "qwen2_5_omni_thinker"):
        raise ModelError(f"{name}: a model of the type {config.model_type!r}; expected a Qwen2.5-Omni or its thinker")
    with torch.device("meta"):
        thinker = Thinker(getattr(config, "thinker_config", config)).eval()
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


def _materialise(policy, name, device, seed=0):
    """Gives a policy, sharded or not, memory on `device`, the weights of `name`, and adapters that `seed` decides."""
    thinker, generator = policy.to_empty(device=device).thinker, torch.Generator().manual_seed(seed)
    thinker.tie_weights()
    for module in thinker.modules():
        if isinstance(module, LoRALinear):
            module.start(generator)
        elif next(module.buffers(recurse=False), None) is not None:
            thinker._init_weights(module)  # computed instead of loaded: rotary frequencies, the audio's positions
    try:
        read_weights({key: p for key, p in thinker.named_parameters() if ".lora_" not in key}, fetch(name))
    except (OSError, SafetensorError) as error:
        raise ModelError(_explain(name)) from error


def load_tokenizer(name):
    """The tokenizer beside the model (a folder or a hub id)."""
    return _read(AutoTokenizer, name)


def _read(kind, name, **options):
    """`kind.from_pretrained(name)`; one process downloads, the others then find the files."""
    with rank_zero_first():
        try:
            return kind.from_pretrained(name, **options)
        except (OSError, ValueError) as error:
            raise ModelError(_explain(name)) from error


def _explain(name):
    if Path(name).is_dir():
        return (f"{name}: the folder has no model or tokenizer that transformers can read "
                "(config.json, *.safetensors, tokenizer.json)")
    return f"{name}: no such folder, and not to be had from the model hub (no network, or no such name)"


def tower_parameters(thinker):
    """The frozen parameters, as a set; they are kept whole on every rank."""
    media_model = media_model_of(thinker)
    towers = (media_model.visual, media_model.audio_tower)
    return {p for tower in towers if tower is not None for p in tower.parameters()}


def set_training(policy, training, gradient_checkpointing):
    """Train mode with activation checkpointing, or eval mode without.

    Decoding must be in eval mode: in train mode transformers' checkpointing silently drops key-value caches.
    """
    policy.train(training)
    if gradient_checkpointing:
        checkpoint_activations(policy.thinker, training)


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
    `known[media_key]` tells `data.InputMaker` that a clip need not be decoded again.
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
        return Prompt(self._send(inputs.prompt_ids), self._send(self._positions(inputs)), visual, audio)

    def _send(self, tensor):
        """`tensor` on the device; a GPU copies it from pinned memory while this process goes on."""
        pinned = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return pinned.to(self.device, non_blocking=True)

    def _visual(self, inputs):
        if inputs.pixel_values is None:
            return None
        model = media_model_of(self.thinker)
        features = model.get_image_features if inputs.shape.visual_kind == "image" else model.get_video_features
        output = features(self._send(inputs.pixel_values), inputs.shape.grid_thw.to(self.device))
        return output.pooler_output[0]

    def _audio(self, inputs):
        if inputs.mel is None:
            return None
        model = media_model_of(self.thinker)
        mel = self._send(inputs.mel).to(model.audio_tower.dtype)[None]
        mask = torch.ones(mel.shape[0], mel.shape[2], dtype=torch.long, device=self.device)
        return model.get_audio_features(mel, mask).last_hidden_state

    def _positions(self, inputs):
        """3-D rotary positions (3, P). On the CPU: transformers walks over the tokens in Python."""
        shape, ids = inputs.shape, inputs.prompt_ids[None]
        video = shape.grid_thw if shape.visual_kind == "video" else None
        positions, _ = media_model_of(self.thinker).get_rope_index(
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
    return decoder_of(thinker)(
        inputs_embeds=embeds, position_ids=position_ids, attention_mask={"full_attention": None}, use_cache=False,
        attend=attend,
    ).last_hidden_state
