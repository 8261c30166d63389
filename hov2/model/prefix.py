"""A prompt and its G completions as one row, so that the prompt is computed once instead of G times.

    row        [ prompt | completion 1 | ... | completion G ]          P + G * C tokens, several groups may follow
    positions    0 .. n | n+1 ..       |     | n+1 ..                  each completion starts again after the prompt
    attention    causal   prompt + own causal part, for each completion

In a GRPO step the prompt (thousands of video and audio tokens) is most of the work; plain batching repeats it G times
in every forward and backward pass. The result is the same numbers: `tests/test_prefix.py` compares values and gradients
with G separate rows. Idea: PrefixGrouper (2025), here as an attention function of 20 lines.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from hov2.model.logps import chunked_token_logps
from hov2.model.thinker import decode, embed


@dataclass(frozen=True)
class Segment:
    """Where one group stands in the row."""

    start: int  # of its prompt
    prompt_length: int
    num_generations: int  # 0: a prompt alone (prefill)
    completion_length: int

    @property
    def prompt_end(self):
        """One past the prompt's last token, where the first completion starts."""
        return self.start + self.prompt_length

    @property
    def end(self):
        """One past the group's last token."""
        return self.prompt_end + self.num_generations * self.completion_length


@dataclass
class Row:
    """Groups packed into one row of L tokens."""

    ids: torch.Tensor  # (L,)
    position_ids: torch.Tensor  # (3, L)
    visual: torch.Tensor | None  # (visual tokens of all prompts, D)
    audio: torch.Tensor | None
    segments: list[Segment]


def pack(prompts, completions=None):
    """Packs prompts, each with its completions (G, C) right-padded to a common C, into one Row."""
    ids, positions, segments, start = [], [], [], 0
    for i, prompt in enumerate(prompts):
        ids.append(prompt.ids)
        positions.append(prompt.position_ids)
        generations, length = (0, 0) if completions is None else completions[i].shape
        if generations:
            ids.append(completions[i].reshape(-1))
            after = prompt.next_position + torch.arange(length, device=prompt.ids.device)
            positions.append(after.repeat(generations).expand(3, -1))
        segments.append(Segment(start, len(prompt.ids), generations, length))
        start = segments[-1].end
    visual = [p.visual for p in prompts if p.visual is not None]
    audio = [p.audio for p in prompts if p.audio is not None]
    return Row(torch.cat(ids), torch.cat(positions, 1), torch.cat(visual) if visual else None,
               torch.cat(audio) if audio else None, segments)


def packed_attention(segments):
    """The attention of a packed row: `attend(layer, query, key, value, scale)` for `model.decode`.

    query (1, heads, L, head_dim), key and value (1, kv heads, L, head_dim); returns (1, heads, L, head_dim).
    """

    def attend(layer, query, key, value, scale):
        return torch.cat([part for s in segments for part in _segment_attention(s, query, key, value, scale)], 2)

    return attend


def _segment_attention(segment, query, key, value, scale):
    """Attention of one group, in two parts: the prompt's, and the completions' as a batch of G rows."""
    prompt = slice(segment.start, segment.prompt_end)
    q, k, v = query[:, :, prompt], key[:, :, prompt], value[:, :, prompt]
    yield causal_attention(q, k, v, scale)
    g, c = segment.num_generations, segment.completion_length
    if not g:
        return

    def completions(x):  # (1, heads, L, hd) -> (G, heads, C, hd)
        return x[0, :, segment.prompt_end:segment.end].unflatten(1, (g, c)).transpose(0, 1)

    own_k = torch.cat([k.expand(g, -1, -1, -1), completions(key)], 2)  # (G, kv heads, P + C, hd)
    own_v = torch.cat([v.expand(g, -1, -1, -1), completions(value)], 2)
    out = causal_attention(completions(query), own_k, own_v, scale)  # the prompt and the own past
    yield out.transpose(0, 1).flatten(1, 2)[None]  # (1, heads, G * C, hd)


def causal_attention(query, key, value, scale):
    """Causal attention with key-value heads that several query heads share; the queries are the last of the keys' row.

    query (B, heads, C, hd), key and value (B, kv heads, L, hd) with L >= C: query number i sees keys up to L - C + i.
    """
    if query.is_cuda and query.dtype == torch.float32:  # no flash kernel, and none of the others shares heads
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if query.shape[2] == key.shape[2]:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    mask = causal_lower_right(query.shape[2], key.shape[2])  # flash kernels know this form: no mask in memory
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


def group_logps(thinker, prompts, completions, temperature=1.0, chunk=128):
    """Per-token log-probs and entropies of each group's completions, in one forward pass.

    prompts: list of Prompt; completions: one (G, C) tensor of ids for each. Returns two lists of (G, C) float32
    tensors; the log-probs carry gradients, the entropies don't. The first completion token is predicted by the prompt's
    last one, for all G alike.
    """
    hidden, row = _hidden(thinker, prompts, completions)
    sources = torch.cat([_predictors(segment, hidden.device) for segment in row.segments])
    targets = torch.cat([c.reshape(-1) for c in completions])
    logps, entropy = chunked_token_logps(hidden[sources], thinker.lm_head.weight, targets, temperature, chunk)
    sizes = [c.numel() for c in completions]  # clone: FSDP wants no views as outputs
    return tuple([part.view_as(c).clone() for part, c in zip(x.split(sizes), completions)] for x in (logps, entropy))


def conversation_logps(thinker, prompts, completions, chunk=128):
    """Log-probs of every text token of the conversations, prompts included: one (tokens,) tensor for each prompt.

    completions: (1, C) each. Left out are the first token, which nothing predicts, and the media tokens: as the
    released SFT code does.
    """
    hidden, row = _hidden(thinker, prompts, completions)
    config = thinker.config
    media = torch.tensor([config.image_token_id, config.video_token_id, config.audio_token_id], device=row.ids.device)
    targets = [torch.arange(s.start + 1, s.end, device=row.ids.device) for s in row.segments]
    targets = [t[~torch.isin(row.ids[t], media)] for t in targets]
    places = torch.cat(targets)
    logps, _ = chunked_token_logps(hidden[places - 1], thinker.lm_head.weight, row.ids[places], 1.0, chunk)
    return [part.clone() for part in logps.split([len(t) for t in targets])]  # FSDP wants no views as outputs


def _hidden(thinker, prompts, completions):
    """The decoder's last hidden states (L, D) of the packed row, and the row."""
    row = pack(prompts, completions)
    embeds = embed(thinker, row.ids, row.visual, row.audio)
    return decode(thinker, embeds[None], row.position_ids[:, None], packed_attention(row.segments))[0], row


def _predictors(segment, device):
    """For each completion token, the place in the row whose hidden state predicts it: (G * C,)."""
    g, c = segment.num_generations, segment.completion_length
    places = segment.prompt_end + torch.arange(g * c, device=device).view(g, c) - 1
    places[:, 0] = segment.prompt_end - 1
    return places.reshape(-1)
