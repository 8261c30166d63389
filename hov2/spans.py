"""Where a completion's blocks are: in its text, then in its tokens.

A BPE tokenizer merges a tag's brackets with their neighbours ('.</', '><', '>A') and splits characters over tokens, so
that a tag has no fixed token ids. Everything here works on the tokens' exact bytes: they are joined, the tags (plain
ASCII, hence safe to search in UTF-8) are found in the bytes, and byte offsets are mapped back to tokens.
"""

import codecs
import functools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:  # a test imports this file without transformers
    from transformers import PreTrainedTokenizerBase

TURN_ENDS = ("<|im_end|>", "<|endoftext|>")  # the tokens that end a completion


class Block(NamedTuple):
    """Where a block is: `text[start:end]` with its tags, `text[inner_start:inner_end]` what they hold."""

    start: int
    inner_start: int
    inner_end: int
    end: int


def find_block(text: str | bytes, tag: str) -> Block | None:
    """Find the first `<tag>` in `text` and the first `</tag>` after it; None if the block is absent or never closed."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if isinstance(text, bytes):
        opening, closing = opening.encode(), closing.encode()
    start = text.find(opening)
    if start < 0:
        return None
    inner_start = start + len(opening)
    inner_end = text.find(closing, inner_start)
    if inner_end < 0:
        return None
    return Block(start, inner_start, inner_end, inner_end + len(closing))


def span_masks(token_bytes: list[bytes], span: str = "seen") -> dict[str, Tensor]:
    """Say which of a completion's C tokens carry which rewards (docs/method.md, "5. Which reward").

    Returns {"completion", "context", "think"}, float tensors (C,) of 0 and 1. "completion" is all ones. "context" is
    zero without a context block, "think" without both a context and a think block. Otherwise, for each of the two:

    - "seen": the tokens up to the one that completes the closing tag, which is included.
    - "inside": the tokens that lie wholly between the tags. A token that holds a byte of a tag ('>A', '.</') is part
      of the tag, not of the inside.
    - "before_tag": the tokens before the first one that holds a byte of the closing tag.

    Raises ValueError for another `span`.
    """
    if span not in ("seen", "inside", "before_tag"):
        raise ValueError(f"span: {span!r} is not one of 'seen', 'inside', 'before_tag'")
    text = b"".join(token_bytes)
    ends = list(accumulate(map(len, token_bytes)))  # for each token, the offset of the byte after it
    context = find_block(text, "context")
    think = find_block(text, "think") if context else None
    return {
        "completion": torch.ones(len(ends)),
        "context": _mask_of(context, ends, span),
        "think": _mask_of(think, ends, span),
    }


def token_bytes_of(tokenizer: "PreTrainedTokenizerBase", ids: Iterable[int]) -> list[bytes]:
    """Return the exact bytes of each of `ids` under a byte-level BPE `tokenizer` (Qwen2's): one bytes object an id.

    Added and special tokens are their UTF-8 text; an id beyond the vocabulary (padding rows of the embedding) is b"",
    as it decodes to nothing. Joined, the bytes are those of the decoded text, even where one character's bytes lie in
    several tokens. Needs the tokenizer's `get_vocab()` and `added_tokens_decoder` only.
    """
    table = _byte_table(tokenizer)
    return [table.get(int(token_id), b"") for token_id in ids]


def text_offsets(token_bytes: list[bytes]) -> tuple[str, list[int]]:
    """Return the tokens' text, and after how many of its characters each token ends.

    A character whose bytes lie in several tokens counts for the last of them; bytes that are no UTF-8 become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [decoder.decode(token) for token in token_bytes]
    ends = list(accumulate(map(len, pieces)))
    text = "".join(pieces) + decoder.decode(b"", final=True)
    if ends:
        ends[-1] = len(text)  # the last token gets what a character cut off leaves
    return text, ends


def completion_tokens(tokenizer: "PreTrainedTokenizerBase", rollout: Any) -> list[list[bytes]]:
    """Return the tokens of each completion of a `Rollout` up to its end, as bytes: a list for each of the G rows."""
    rows = []
    for ids, mask in zip(rollout.completion_ids, rollout.completion_mask):
        rows.append(token_bytes_of(tokenizer, ids[mask].tolist()))
    return rows


def completion_texts(token_bytes: list[list[bytes]]) -> list[str]:
    """Return each completion's text, without the end-of-turn token that stands last in most.

    Where the last token is the one that completes the first `</answer>` (`stop_at_answer`), the text ends with the tag:
    tokens are as the tokenizer cut them, and that one may hold the beginning of what would come next ("><").
    """
    turn_ends = [end.encode() for end in TURN_ENDS]
    texts = []
    for tokens in token_bytes:
        if tokens[-1] in turn_ends:
            text, _ = text_offsets(tokens[:-1])
        else:
            text, ends = text_offsets(tokens)
            tag_start = text.find("</answer>")
            tag_end = tag_start + len("</answer>")
            before_last = ends[-2] if len(ends) > 1 else 0
            if tag_start >= 0 and tag_end > before_last:
                text = text[:tag_end]
        texts.append(text)
    return texts


def states_towards(tag: bytes, token_bytes: list[bytes]) -> list[list[int]]:
    """Return a table for finding `tag` while tokens arrive: `states[token][state]` is the state after a token.

    A state says how many bytes of the tag stand at the end of the text so far; it begins at 0. The last one, len(tag),
    is that the tag has been there. token_bytes: one bytes object for each token of the vocabulary. Source: Knuth,
    Morris and Pratt (1977).
    """
    starts = [tag[:length] for length in range(len(tag) + 1)]
    states = []
    for token in token_bytes:
        states.append([_state_after(start + token, tag) for start in starts])
    return states


def _state_after(text: bytes, tag: bytes) -> int:
    """Return how many bytes of the tag stand at the end of `text`; all of them if the tag is anywhere in it."""
    if tag in text:
        return len(tag)
    length = len(tag) - 1
    while not text.endswith(tag[:length]):
        length -= 1
    return length


def _mask_of(block: Block | None, ends: list[int], span: str) -> Tensor:
    """Return 1 for the tokens that carry the reward of `block`, else 0, (C,); all 0 without a block."""
    mask = torch.zeros(len(ends))
    if block:
        first, stop = _token_range(block, ends, span)
        mask[first:stop] = 1.0
    return mask


def _token_range(block: Block, ends: list[int], span: str) -> tuple[int, int]:
    """Return (first, stop): the tokens first..stop-1 carry the reward of `block`, byte offsets as from find_block."""
    if span == "seen":
        return 0, _tokens_reaching(block.end, ends)
    stop = bisect_right(ends, block.inner_end)  # tokens that end no later than where the closing tag starts
    if span == "inside":
        return _tokens_reaching(block.inner_start, ends), stop
    return 0, stop


def _tokens_reaching(offset: int, ends: list[int]) -> int:
    """Return how many leading tokens it takes to cover `offset` bytes."""
    return bisect_left(ends, offset) + 1 if offset else 0


@functools.lru_cache(maxsize=2)
def _byte_table(tokenizer: "PreTrainedTokenizerBase") -> dict[int, bytes]:
    """Return {id: bytes} of all tokens; read once for a tokenizer."""
    added = tokenizer.added_tokens_decoder
    to_byte = _unicode_to_byte()
    table = {}
    for token, token_id in tokenizer.get_vocab().items():
        if token_id in added:
            table[token_id] = token.encode()
        else:
            table[token_id] = bytes(to_byte[character] for character in token)
    return table


def _unicode_to_byte() -> dict[str, int]:
    """Return the inverse of GPT-2's map of bytes to printable characters, in which byte-level vocabularies are written.

    Printable Latin-1 bytes stand for themselves; the other 68, in order, are the characters from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    to_byte = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    for number, byte in enumerate(others):
        to_byte[chr(256 + number)] = byte
    return to_byte
