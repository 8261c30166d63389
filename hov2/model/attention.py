"""The decoder's attention, whose caller says who attends to whom, and that of the towers, in windows.

`prefix.py` says it for training, `rollout.py` for decoding. The rest of the modeling code is transformers' own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAttention

from hov2.model.lora import LoRALinear
from hov2.model.versions import decoder_of, media_model_of

TOWER_ATTENTION = "hov2_flash"  # with "flash" in it, transformers hands over all windows at once instead of one by one


class Attention(Qwen2_5OmniAttention):
    """transformers' attention of a decoder layer, whose caller may say who attends to whom."""

    stacked = None  # within `stacked_projections`: weight and bias of query, key and value, one below the other

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attend: Callable[[int, Tensor, Tensor, Tensor, float], Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Let `attend(layer, query, key, value, scale)`, if there is one, take the place of transformers' own.

        query (B, heads, L, hd), key and value (B, kv heads, L, hd), after the rotary embedding.
        """
        if attend is None:
            return super().forward(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        heads = self.num_heads
        kv_heads = self.num_key_value_heads
        projected = self._project(hidden_states).unflatten(-1, (-1, self.head_dim))  # (B, L, heads + 2 kv heads, hd)
        turned, value = projected.split([heads + kv_heads, kv_heads], 2)
        query, key = rotated(turned, *position_embeddings).split([heads, kv_heads], 2)
        attended = attend(
            self.layer_idx, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), self.scaling
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2)), None

    def _project(self, hidden_states: Tensor) -> Tensor:
        """Return query, key and value beside each other, (B, L, (heads + 2 kv heads) * hd)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if self.stacked is None:
            return torch.cat([project(hidden_states) for project in projections], -1)
        rows = hidden_states.flatten(0, -2)
        weight, bias = self.stacked
        out = nn.functional.linear(rows, weight, bias)
        widths = [len(project.weight) for project in projections]
        for project, columns in zip(projections, out.split(widths, -1)):
            if isinstance(project, LoRALinear):
                project.correct(columns, rows)
        return out.view(*hidden_states.shape[:-1], -1)


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the rotary embedding of `heads` (B, L, heads, hd), in as few kernels as can be.

    That is: heads * cos + (-second half, first half) * sin; cos, sin (B, L, hd), as transformers' rotary embedding
    gives them.
    """
    first, second = heads.chunk(2, -1)
    first_sin, second_sin = sin[:, :, None].chunk(2, -1)
    first_cos, second_cos = (heads * cos[:, :, None]).chunk(2, -1)
    new_first = torch.addcmul(first_cos, second, first_sin, value=-1)
    new_second = torch.addcmul(second_cos, first, second_sin)
    return torch.cat([new_first, new_second], -1)


@contextmanager
def stacked_projections(thinker: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Inside, query, key and value are one product, of a copy of their weights: fewer kernels, each with more to do.

    For decoding on CUDA, where that is a tenth of the time; weights must be whole (`distributed.unsharded`) and stay.
    """
    attentions = [layer.self_attn for layer in decoder_of(thinker).layers] if wanted else []
    try:
        for attention in attentions:
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            weight = torch.cat([project.weight.detach() for project in projections])
            bias = torch.cat([project.bias.detach() for project in projections])
            attention.stacked = (weight, bias)
        yield
    finally:
        for attention in attentions:
            attention.stacked = None


def tower_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute a tower's attention within windows that stand one after the other: query, key, value (1, heads, L, hd).

    cu_seq_lens_q: where each window starts, and the end of the last. Returns (1, L, heads, hd), as transformers wants.
    """
    if query.is_cuda and query.dtype != torch.float32:  # one kernel for windows of all lengths
        out = varlen_attn(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
        )
        return out[None], None
    parts = []
    start = 0
    for length, run in groupby(cu_seq_lens_q.diff().tolist()):  # windows of equal length in a row: one batch
        windows = len(list(run))
        stop = start + windows * length
        out = nn.functional.scaled_dot_product_attention(
            query[0, :, start:stop].unflatten(1, (windows, length)).transpose(0, 1),
            key[0, :, start:stop].unflatten(1, (windows, length)).transpose(0, 1),
            value[0, :, start:stop].unflatten(1, (windows, length)).transpose(0, 1),
            scale=scaling,
        )  # (windows, heads, length, hd)
        parts.append(out.transpose(1, 2).flatten(0, 1))
        start = stop
    return torch.cat(parts)[None], None


AttentionInterface.register(TOWER_ATTENTION, tower_attention)


def use_own_parts(thinker: nn.Module) -> None:
    """Give a thinker the attention above, and torch's own norms: one kernel on CUDA instead of eight.

    transformers writes a norm out in single operations, and rounds before its product with the weight, torch after it;
    in float32 both are the same.
    """
    decoder = decoder_of(thinker)
    media_model = media_model_of(thinker)
    for layer in decoder.layers:
        layer.self_attn.__class__ = Attention  # the same weights under the same names, another `forward`
    for tower in (media_model.visual, media_model.audio_tower):
        tower.config._attn_implementation = TOWER_ATTENTION  # the setter would look for a package of that name
    for parent in list(decoder.modules()):  # a list, because the loop changes them
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, _fused_norm(child))


def _fused_norm(norm: nn.Module) -> nn.RMSNorm:
    """Return torch's own norm with the weight of one of transformers'."""
    fused = nn.RMSNorm(norm.weight.shape[0], norm.variance_epsilon, device="meta")
    fused.weight = norm.weight
    return fused
