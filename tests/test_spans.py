"""Spans: blocks in text, then in tokens, whatever the tokenizer merges."""

import json
import random
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from hov2.spans import (
    _token_range,
    completion_texts,
    find_block,
    span_masks,
    states_towards,
    token_bytes_of,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tag_texts.json").read_text())["cases"]

# One token a line; '|' never occurs in the text itself.
PLAIN = "<context|>A| man|.</|context|><|think|>so|.</|think|>\n|<answer>|B|</answer>"
PIECES = [piece.encode() for piece in PLAIN.split("|")]


def marked(pieces, mask):
    """The text of the tokens that a mask keeps."""
    return b"".join(piece for piece, keep in zip(pieces, mask.tolist(), strict=True) if keep).decode()


def seen_until(pieces, tag):
    """How many leading tokens reach through the end of the block."""
    block = find_block(b"".join(pieces), tag)
    return _token_range(block, list(accumulate(map(len, pieces))), "seen")[1] if block else 0


def test_find_block_is_the_first_tag_and_the_first_closing_tag_after_it():
    text = "a</context><context>x<context>y</context>z</context>"
    start, inner_start, inner_end, end = find_block(text, "context")
    assert text[start:end] == "<context>x<context>y</context>"
    assert text[inner_start:inner_end] == "x<context>y"


@pytest.mark.parametrize(
    "text",
    ["", "<context>open", "closed</context>", "</context><context>", "<Context>a</Context>", "<context >a</context>"],
)
def test_find_block_needs_both_tags_exactly(text):
    assert find_block(text, "context") is None
    assert find_block(text.encode(), "context") is None


@pytest.mark.parametrize("case", GOLDEN, ids=[case["text"][:30] for case in GOLDEN])
def test_seen_until_under_qwens_real_merges(case):
    pieces = [bytes.fromhex(piece) for piece in case["token_bytes"]]
    assert {tag: seen_until(pieces, tag) for tag in case["seen_until"]} == case["seen_until"]


def test_seen_masks_reach_through_the_token_that_completes_the_closing_tag():
    masks = span_masks(PIECES, "seen")
    assert marked(PIECES, masks["context"]) == "<context>A man.</context><"  # '><' completes </context>
    assert marked(PIECES, masks["think"]) == "<context>A man.</context><think>so.</think>\n"
    assert masks["completion"].tolist() == [1.0] * len(PIECES)
    assert {mask.dtype for mask in masks.values()} == {torch.float32}


def test_inside_masks_leave_out_every_token_that_touches_a_tag():
    masks = span_masks(PIECES, "inside")
    assert marked(PIECES, masks["context"]) == " man"  # '>A' and '.</' hold bytes of the tags
    assert marked(PIECES, masks["think"]) == ""
    apart = [b"<context>", b"A", b" man", b"</context>", b"<think>", b"so", b".", b"</think>"]
    masks = span_masks(apart, "inside")
    assert marked(apart, masks["context"]) == "A man"
    assert marked(apart, masks["think"]) == "so."


def test_released_masks_stop_before_the_closing_tags_first_token():
    masks = span_masks(PIECES, "before_tag")
    assert marked(PIECES, masks["context"]) == "<context>A man"
    assert marked(PIECES, masks["think"]) == "<context>A man.</context><think>so"


@pytest.mark.parametrize("span", ["seen", "inside", "before_tag"])
def test_logic_needs_both_blocks_and_context_its_own(span):
    only_think = [b"<think>", b"so", b"</think>", b"<answer>B</answer>"]
    assert span_masks(only_think, span)["context"].sum() == 0
    assert span_masks(only_think, span)["think"].sum() == 0
    only_context = [b"<context>", b"A", b"</context>", b"<think>", b"cut off"]
    assert span_masks(only_context, span)["context"].sum() == {"seen": 3, "inside": 1, "before_tag": 2}[span]
    assert span_masks(only_context, span)["think"].sum() == 0


def test_empty_blocks_and_empty_completions():
    empty = [b"<context>", b"</context>", b"<think>", b"</think>"]
    assert span_masks(empty, "inside")["context"].tolist() == [0, 0, 0, 0]
    assert span_masks(empty, "seen")["context"].tolist() == [1, 1, 0, 0]
    merged = [b"<context", b"></", b"context", b">"]  # the token '></' closes one tag and opens the other
    assert span_masks(merged, "inside")["context"].sum() == 0
    assert span_masks(merged, "before_tag")["context"].tolist() == [1, 0, 0, 0]
    assert span_masks([], "seen")["completion"].tolist() == []


def test_every_way_to_cut_the_bytes_gives_the_same_meaning():
    text = "é<context>你好。</context><think>ok</think>".encode()
    end = text.index(b"</context>") + len(b"</context>")
    for width in range(1, 12):
        pieces = [text[i : i + width] for i in range(0, len(text), width)]
        n = seen_until(pieces, "context")
        assert len(b"".join(pieces[:n])) >= end > len(b"".join(pieces[: n - 1]))


def test_tokens_without_bytes_and_an_end_of_turn_token_change_nothing():
    pieces = [b"", b"<context>", b"", b"a</context>", b"", b"<think>b</think>", b"<|im_end|>"]
    assert seen_until(pieces, "context") == 4
    assert span_masks(pieces, "seen")["think"].tolist() == [1, 1, 1, 1, 1, 1, 0]


def test_an_unknown_credit_is_an_error():
    with pytest.raises(ValueError, match="'after' is not one of"):
        span_masks(PIECES, "after")


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE whose merges join tags with their neighbours, as Qwen's do."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = [
        "a man talks.</context><think>he is sad.</think>\n<answer>B</answer>",
        "<context>é 你好 naïve</context>",
    ] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    trained = json.loads(bpe.to_str())["model"]
    tok = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tok.add_tokens(["<|im_start|>", "<|VIDEO|>", "schön"], special_tokens=True)
    return tok


@pytest.mark.parametrize(
    "text",
    [
        "<context>A man talks.</context><think>He is sad.</think>\n<answer>B</answer>",
        "<context>你好。naïve 🙂\t\x00</context>\n<think>“so”</think>",
        "<context>a</context><|im_end|>",
        "schön<|im_start|>assistant\n  two  spaces",
    ],
)
def test_token_bytes_join_to_the_text_exactly(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    pieces = token_bytes_of(tokenizer, ids)
    assert b"".join(pieces) == text.encode()
    assert len(pieces) == len(ids)


def test_token_bytes_split_characters_and_know_added_tokens(tokenizer):
    pieces = token_bytes_of(tokenizer, tokenizer("🙂")["input_ids"])
    assert len(pieces) > 1 and b"".join(pieces) == "🙂".encode()  # one character over several tokens
    assert token_bytes_of(tokenizer, torch.tensor([tokenizer.eos_token_id])) == [b"<|im_end|>"]
    assert token_bytes_of(tokenizer, tokenizer("schön")["input_ids"]) == ["schön".encode()]
    assert token_bytes_of(tokenizer, [len(tokenizer) + 7]) == [b""]


def test_spans_through_a_real_tokenizer_match_the_text(tokenizer):
    text = "é.<context>你好🙂.</context><think>naïve.</think>\n<answer>B</answer><|im_end|>"
    pieces = token_bytes_of(tokenizer, tokenizer(text)["input_ids"])
    assert b".</" in b" ".join(pieces)  # the merge that hides the tag's ids is there
    n = seen_until(pieces, "think")
    assert b"".join(pieces[:n]).decode().startswith(text[: find_block(text, "think")[3]])
    assert find_block(b"".join(pieces[: n - 1]), "think") is None


def test_states_find_a_tag_when_it_is_complete():
    tag, tokens = b"aab>", [b"a", b"aa", b"b", b"b>", b">", b"xaab>y", b""]
    states, draw = states_towards(tag, tokens), random.Random(0)
    for _ in range(300):
        text, state = b"", 0
        for token in draw.choices(range(len(tokens)), k=12):
            text, state = text + tokens[token], states[token][state]
            assert (state == len(tag)) == (tag in text)


def test_texts_are_without_the_token_that_ends_the_turn():
    rows = [[b"A", b"<|im_end|>"], [b"A", b"<|endoftext|>"], [b"A", b"</answer>"], [b"cut", b" off"]]
    assert completion_texts(rows) == ["A", "A", "A</answer>", "cut off"]


@pytest.mark.parametrize(
    "tokens, text",
    [
        ([b"<answer>A", b"</answer", b"><"], "<answer>A</answer>"),  # sampling stopped here: stop_at_answer
        ([b"<answer>A</answer", b">\n\n"], "<answer>A</answer>"),
        ([b"<answer>A</answer>"], "<answer>A</answer>"),
        ([b"<answer>A</answer><"], "<answer>A</answer>"),
        ([b"<answer>\xc3", b"\xa9</answer", b">B"], "<answer>é</answer>"),
        ([b"<answer>A</answer", b"><", b"<|im_end|>"], "<answer>A</answer><"),  # the model itself went on, and ended
        ([b"<answer>A</answer", b">", b"<"], "<answer>A</answer><"),
        ([b"</answer>", b"<answer>B</answer", b"><"], "</answer><answer>B</answer><"),
        ([b"<|im_end|>"], ""),
    ],
)
def test_a_text_that_was_stopped_at_its_answer_ends_with_the_tag(tokens, text):
    assert completion_texts([tokens]) == [text]
