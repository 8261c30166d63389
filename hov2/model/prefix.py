"""A prompt and its G completions as one row, so that the prompt is computed once instead of G times.

    row        [ prompt | completion 1 | ... | completion G ]          P + G * C tokens, several groups may follow
    positions    0 .. n | n+1 ..       |     | n+1 ..                  each completion starts again after the prompt
    attention    causal   prompt + own causal part, for each completion

In a GRPO step the prompt (thousands of video and audio tokens) is most of the work; plain batching repeats it G times
in every forward and backward pass. The result is the same numbers: `tests/model/test_prefix.py` compares values and
gradients with G separate rows. Idea: PrefixGrouper (2025), here as an attention function of 20 lines.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from hov2.model.encoder import Prompt
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
    def prompt_end(self) -> int:
        """One past the prompt's last token, where the first completion starts."""
        return self.start + self.prompt_length

    @property
    def end(self) -> int:
        """One past the group's last token."""
        return self.prompt_end + self.num_generations * self.completion_length


@dataclass
class Row:
    """Groups packed into one row of L tokens."""

    ids: Tensor  # (L,)
    position_ids: Tensor  # (3, L)
    visual: Tensor | None  # (visual tokens of all prompts, D)
    audio: Tensor | None
    segments: list[Segment]


def pack(prompts: list[Prompt], completions: list[Tensor] | None = None) -> Row:
    """Pack prompts, each with its completions (G, C) right-padded to a common C, into one Row."""
    ids, positions, segments = [], [], []
    start = 0
    for index, prompt in enumerate(prompts):
        ids.append(prompt.ids)
        positions.append(prompt.position_ids)
        generations, length = (0, 0) if completions is None else completions[index].shape
        if generations:
            ids.append(completions[index].reshape(-1))
            after = prompt.next_position + torch.arange(length, device=prompt.ids.device)
            positions.append(after.repeat(generations).expand(3, -1))
        segment = Segment(start, len(prompt.ids), generations, length)
        segments.append(segment)
        start = segment.end
    visual = _joined([prompt.visual for prompt in prompts])
    audio = _joined([prompt.audio for prompt in prompts])
    return Row(torch.cat(ids), torch.cat(positions, 1), visual, audio, segments)


def _joined(features: list[Tensor | None]) -> Tensor | None:
    """Return the towers' outputs of all prompts that have some, one after the other; None if no prompt has."""
    present = [feature for feature in features if feature is not None]
    return torch.cat(present) if present else None


def packed_attention(segments: list[Segment]) -> Callable[[int, Tensor, Tensor, Tensor, float], Tensor]:
    """Return the attention of a packed row: `attend(layer, query, key, value, scale)` for `thinker.decode`.

    query (1, heads, L, head_dim), key and value (1, kv heads, L, head_dim); returns (1, heads, L, head_dim).
    """

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        parts = []
        for segment in segments:
            parts.extend(_segment_attention(segment, query, key, value, scale))
        return torch.cat(parts, 2)

    return attend


def _segment_attention(segment: Segment, query: Tensor, key: Tensor, value: Tensor, scale: float) -> list[Tensor]:
    """Return the attention of one group: the prompt's, and, if there are completions, theirs as a batch of G rows."""
    prompt = slice(segment.start, segment.prompt_end)
    prompt_key = key[:, :, prompt]
    prompt_value = value[:, :, prompt]
    of_prompt = causal_attention(query[:, :, prompt], prompt_key, prompt_value, scale)
    generations = segment.num_generations
    if generations == 0:
        return [of_prompt]

    def completions(tensor: Tensor) -> Tensor:  # (1, heads, L, hd) -> (G, heads, C, hd)
        own = tensor[0, :, segment.prompt_end : segment.end]
        return own.unflatten(1, (generations, segment.completion_length)).transpose(0, 1)

    seen_key = torch.cat([prompt_key.expand(generations, -1, -1, -1), completions(key)], 2)  # (G, kv heads, P + C, hd)
    seen_value = torch.cat([prompt_value.expand(generations, -1, -1, -1), completions(value)], 2)
    out = causal_attention(completions(query), seen_key, seen_value, scale)  # the prompt and the own past
    of_completions = out.transpose(0, 1).flatten(1, 2)[None]  # (1, heads, G * C, hd)
    return [of_prompt, of_completions]


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute causal attention with key-value heads that several query heads share.

    The queries are the last of the keys' row: of query (B, heads, C, hd), key and value (B, kv heads, L, hd) with
    L >= C, query number i sees keys up to L - C + i.
    """
    if query.is_cuda and query.dtype == torch.float32:  # no flash kernel, and none of the others shares heads
        shared_by = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(shared_by, 1)
        value = value.repeat_interleave(shared_by, 1)
    if query.shape[2] == key.shape[2]:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    mask = causal_lower_right(query.shape[2], key.shape[2])  # flash kernels know this form: no mask in memory
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


def group_logps(
    thinker: nn.Module,
    prompts: list[Prompt],
    completions: list[Tensor],
    temperature: float = 1.0,
    chunk: int = 128,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return per-token log-probs and entropies of each group's completions, from one forward pass.

    prompts: list of Prompt; completions: one (G, C) tensor of ids for each. Returns two lists of (G, C) float32
    tensors; the log-probs carry gradients, the entropies don't. The first completion token is predicted by the prompt's
    last one, for all G alike.
    """
    hidden, row = _hidden(thinker, prompts, completions)
    sources = torch.cat([_predictors(segment, hidden.device) for segment in row.segments])
    targets = torch.cat([ids.reshape(-1) for ids in completions])
    logps, entropy = chunked_token_logps(hidden[sources], thinker.lm_head.weight, targets, temperature, chunk)
    return _by_group(logps, completions), _by_group(entropy, completions)


def _by_group(values: Tensor, completions: list[Tensor]) -> list[Tensor]:
    """Split one value for each completion token, (tokens of all groups,), into a (G, C) tensor for each group."""
    sizes = [ids.numel() for ids in completions]
    groups = []
    for part, ids in zip(values.split(sizes), completions):
        groups.append(part.view_as(ids).clone())  # clone: FSDP wants no views as outputs
    return groups


def conversation_logps(
    thinker: nn.Module, prompts: list[Prompt], completions: list[Tensor], chunk: int = 128
) -> list[Tensor]:
    """Return log-probs of every text token of the conversations, prompts included: (tokens,) for each prompt.

    completions: (1, C) each. Left out are the first token, which nothing predicts, and the media tokens: as the
    released SFT code does.
    """
    hidden, row = _hidden(thinker, prompts, completions)
    config = thinker.config
    media = torch.tensor([config.image_token_id, config.video_token_id, config.audio_token_id], device=row.ids.device)
    places = []  # in the row, of each conversation's text tokens
    for segment in row.segments:
        predicted = torch.arange(segment.start + 1, segment.end, device=row.ids.device)
        is_media = torch.isin(row.ids[predicted], media)
        places.append(predicted[~is_media])
    targets = torch.cat(places)
    logps, _ = chunked_token_logps(hidden[targets - 1], thinker.lm_head.weight, row.ids[targets], 1.0, chunk)
    lengths = [len(of_one) for of_one in places]
    return [part.clone() for part in logps.split(lengths)]  # clone: FSDP wants no views as outputs


def _hidden(thinker: nn.Module, prompts: list[Prompt], completions: list[Tensor]) -> tuple[Tensor, Row]:
    """Return the decoder's last hidden states (L, D) of the packed row, and the row."""
    row = pack(prompts, completions)
    embeds = embed(thinker, row.ids, row.visual, row.audio)
    hidden = decode(thinker, embeds[None], row.position_ids[:, None], packed_attention(row.segments))
    return hidden[0], row


def _predictors(segment: Segment, device: torch.device) -> Tensor:
    """Return, for each completion token, the place in the row whose hidden state predicts it: (G * C,)."""
    shape = (segment.num_generations, segment.completion_length)
    first = segment.prompt_end - 1
    places = torch.arange(first, segment.end - 1, device=device).view(shape)  # the token before
    places[:, 0] = first  # the prompt's last token, for all G alike
    return places.reshape(-1)
