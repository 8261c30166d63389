"""Where a completion's blocks are: in its text, then in its tokens.

A BPE tokenizer merges a tag's brackets with their neighbours ('.</', '><', '>A') and splits characters over tokens, so
that a tag has no fixed token ids. Everything here works on the tokens' exact bytes: they are joined, the tags (plain
ASCII, hence safe to search in UTF-8) are found in the bytes, and byte offsets are mapped back to tokens.
"""

import codecs
import functools
from bisect import bisect_left, bisect_right
from itertools import accumulate

import torch

TURN_ENDS = ("<|im_end|>", "<|endoftext|>")  # the tokens that end a completion


def find_block(text, tag):
    """The first `<tag>` in `text` (str or bytes) and the first `</tag>` after it.

    Returns (start, inner_start, inner_end, end), so that `text[start:end]` is the block with its tags and
    `text[inner_start:inner_end]` what they hold; None if the block is absent or never closed.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    if isinstance(text, bytes):
        opening, closing = opening.encode(), closing.encode()
    start = text.find(opening)
    inner_start = start + len(opening)
    inner_end = text.find(closing, inner_start) if start >= 0 else -1
    return (start, inner_start, inner_end, inner_end + len(closing)) if inner_end >= 0 else None


def span_masks(token_bytes, credit="seen"):
    """Which of a completion's C tokens carry which rewards (method.md, "Advantage").

    Returns {"full", "context", "logic"}, float tensors (C,) of 0 and 1. "full" is all ones. "context" is zero without a
    context block, "logic" without both a context and a think block. Otherwise, for the context (think) block:

    - "seen": the tokens up to the one that completes the closing tag, which is included.
    - "inside": the tokens that lie wholly between the tags. A token that holds a byte of a tag ('>A', '.</') is part
      of the tag, not of the inside.
    - "released": the tokens before the first one that holds a byte of the closing tag.

    Raises ValueError for another `credit`.
    """
    if credit not in ("seen", "inside", "released"):
        raise ValueError(f"credit: {credit!r} is not one of 'seen', 'inside', 'released'")
    text, ends = b"".join(token_bytes), list(accumulate(map(len, token_bytes)))
    context, think = find_block(text, "context"), find_block(text, "think")
    masks = {"full": torch.ones(len(ends)), "context": torch.zeros(len(ends)), "logic": torch.zeros(len(ends))}
    for name, block in (("context", context), ("logic", think if context else None)):
        if block:
            first, last = _token_range(block, ends, credit)
            masks[name][first:last] = 1.0
    return masks


def token_bytes_of(tokenizer, ids):
    """The exact bytes of each of `ids` under a byte-level BPE `tokenizer` (Qwen2's): one bytes object an id.

    Added and special tokens are their UTF-8 text; an id beyond the vocabulary (padding rows of the embedding) is b"",
    as it decodes to nothing. Joined, the bytes are those of the decoded text, even where one character's bytes lie in
    several tokens. Needs the tokenizer's `get_vocab()` and `added_tokens_decoder` only.
    """
    table = _byte_table(tokenizer)
    return [table.get(int(i), b"") for i in ids]


def text_offsets(token_bytes):
    """The tokens' text, and after how many of its characters each token ends: (text, list of ints).

    A character whose bytes lie in several tokens counts for the last of them; bytes that are no UTF-8 become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [decoder.decode(token) for token in token_bytes]
    ends = list(accumulate(map(len, pieces)))
    text = "".join(pieces) + decoder.decode(b"", final=True)
    return text, ends[:-1] + [len(text)] if ends else []


def completion_tokens(tokenizer, rollout):
    """The tokens of each completion of a `rollout.Rollout` up to its end, as bytes: a list for each of the G rows."""
    return [token_bytes_of(tokenizer, ids[mask].tolist())
            for ids, mask in zip(rollout.completion_ids, rollout.completion_mask)]


def completion_texts(token_bytes):
    """Each completion's text, without the end-of-turn token that stands last in most."""
    ends = [end.encode() for end in TURN_ENDS]
    return [text_offsets(tokens[:-1] if tokens[-1] in ends else tokens)[0] for tokens in token_bytes]


def states_towards(tag, token_bytes):
    """For finding `tag` (bytes) while tokens arrive: `states[token][state]` is the state after a token.

    A state says how many bytes of the tag stand at the end of the text so far; it begins at 0. The last one, len(tag),
    is that the tag has been there. token_bytes: one bytes object for each token of the vocabulary. Source: Knuth,
    Morris and Pratt (1977).
    """
    starts = [tag[:n] for n in range(len(tag), -1, -1)]  # longest first

    def after(text):
        return len(tag) if tag in text else len(next(start for start in starts if text.endswith(start)))

    return [[after(start + token) for start in reversed(starts)] for token in token_bytes]


def _tokens_reaching(offset, ends):
    """How many leading tokens it takes to cover `offset` bytes."""
    return bisect_left(ends, offset) + 1 if offset else 0


def _token_range(block, ends, credit):
    """(first, last): the tokens first..last-1 that carry the reward of `block`, byte offsets as from find_block."""
    _, inner_start, inner_end, end = block
    if credit == "seen":
        return 0, _tokens_reaching(end, ends)
    before_closing = bisect_right(ends, inner_end)  # tokens that end no later than where the closing tag starts
    return (_tokens_reaching(inner_start, ends) if credit == "inside" else 0), before_closing


@functools.lru_cache(maxsize=2)
def _byte_table(tokenizer):
    """{id: bytes} of all tokens; read once for a tokenizer."""
    added = tokenizer.added_tokens_decoder
    to_byte = _unicode_to_byte()
    return {i: token.encode() if i in added else bytes(to_byte[character] for character in token)
            for token, i in tokenizer.get_vocab().items()}


def _unicode_to_byte():
    """The inverse of GPT-2's map of bytes to printable characters, which byte-level vocabularies are written in.

    Printable Latin-1 bytes stand for themselves; the other 68, in order, are the characters from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
