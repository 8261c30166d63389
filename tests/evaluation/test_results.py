"""Means, intervals, votes and comparisons, on records whose answers are known."""

import re

import numpy as np
import pytest

from hov2.evaluation.results import (
    compare,
    format_comparison,
    format_protocol,
    format_summary,
    interval,
    majority,
    mean,
    over_samples,
    summarize,
)
from tests.support.evalkit import answer, record


def test_mean_leaves_out_what_is_unknown():
    assert mean([1.0, None, 0.0]) == 0.5
    assert mean([None]) is None and mean([]) is None


def test_interval_is_seeded_and_covers():
    values = [1.0] * 60 + [0.0] * 40
    low, high = interval(values)
    assert interval(values) == [low, high] and interval(values, seed=1) != [low, high]
    assert interval([*values, None]) == [low, high]
    assert abs(low - (0.6 - 1.96 * 0.049)) < 0.02 and abs(high - (0.6 + 1.96 * 0.049)) < 0.02  # the normal's
    assert interval([0.5] * 9) == [0.5, 0.5] and interval([None]) is None and interval([]) is None


def test_interval_holds_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        low, high = interval((rng.random(80) < 0.4).astype(float))
        hits += low <= 0.4 <= high
    assert 180 <= hits <= 199


@pytest.mark.parametrize(
    "votes, elected",
    [
        (["A", "B", "B"], 1),
        (["B", "A", "A", "B"], 0),
        ([None, None, "C"], 2),
        ([None, None], 0),
        (["A"], 0),
        ([None, "A", None, "B", "B"], 3),
    ],
)
def test_majority_takes_the_most_frequent_and_of_equals_the_first(votes, elected):
    assert majority(votes) == elected


def test_over_samples():
    samples = [answer(0.0, "A"), answer(1.0, "B"), answer(1.0, "B", truncated=True), answer(None, None, no_answer=True)]
    merged = over_samples(samples)
    assert merged["accuracy"] == pytest.approx(2 / 3) and merged["pass"] == 1.0 and merged["majority"] == 1.0
    assert merged["parsed"] == merged["answer"] == "B" and merged["samples"] == samples
    assert (merged["no_answer"], merged["truncated"], merged["context"]) == (1, 1, None)
    assert over_samples([answer(None)] * 2)["pass"] is None


def test_summary_of_single_answers():
    records = [
        record("a", 1.0),
        record("b", 0.0, truncated=True),
        record("c", 0.5, "emer_ov_mc"),
        record("d", None, "free-form"),
        record("e", error="e.mp4: no such file"),
    ]
    summary = summarize(records)
    assert (summary["questions"], summary["answers"], summary["unreadable"], summary["unscored"]) == (5, 4, 1, 1)
    assert (summary["accuracy"], summary["truncated"], summary["no_answer"]) == (0.5, 1, 0)
    assert summary["by_problem_type"]["multiple choice"]["questions"] == 3  # the unreadable one is one of them
    assert summary["by_problem_type"]["multiple choice"]["accuracy"] == 0.5
    assert summary["by_problem_type"]["free-form"] == {"questions": 1, "accuracy": None, "interval": None}
    assert set(summary["intervals"]) == {"accuracy"} and summary["context"] is None
    low, high = summary["intervals"]["accuracy"]
    assert 0 <= low < 0.5 < high <= 1
    text = format_summary(summary)
    assert re.search(r"all +5 +0\.500  0\.\d+ to [01]\.\d+", text)
    assert "unreadable: 1" in text and "truncated: 1" in text


def test_summary_of_several_samples():
    records = [
        record("a", samples=[answer(1.0, "A"), answer(0.0, "B"), answer(0.0, "B"), answer(0.0, "B")]),
        record("b", samples=[answer(1.0, "C"), answer(1.0, "C"), answer(0.0, "D"), answer(1.0, "C")]),
        record("c", error="c.mp4: broken"),
    ]
    summary = summarize(records)
    assert (summary["mean@4"], summary["pass@4"], summary["majority@4"]) == (0.5, 1.0, 0.5)
    assert summary["accuracy"] == summary["mean@4"] and summary["answers"] == 8 and summary["unreadable"] == 1
    assert summary["intervals"]["pass@4"] == [1.0, 1.0]
    assert "majority@4" in format_summary(summary)


def test_summary_of_nothing_readable():
    summary = summarize([record("a", error="gone")])
    assert summary["accuracy"] is None and summary["intervals"]["accuracy"] is None
    assert "unreadable: 1" in format_summary(summary)


def test_comparison_names_what_changed():
    first = [
        record("a", 1.0),
        record("b", 0.0),
        record("c", 0.0),
        record("c", 1.0),
        record("gone", 1.0),
        record("e", error="e.mp4: broken"),
    ]
    second = [
        record("c", 0.0),
        record("a", 1.0),
        record("b", 1.0, parsed="B"),
        record("c", 0.0, parsed=None, answer=None),
        record("e", 1.0),
        record("new", 1.0),
    ]
    found = compare(first, second)
    assert len(found["pairs"]) == 5 and (found["better"], found["worse"], found["difference"]) == (1, 1, 0.0)
    assert [a["id"] for a, _ in found["changed"]] == ["b", "c", "e"]
    assert found["only"] == [["gone"], ["new"]]
    protocol = {"model": "m", "system_prompt": "hov2", "seed": 0}
    results = [
        {"protocol": protocol | {"model": name}, **summarize(records)}
        for name, records in (("one", first), ("two", second))
    ]
    text = format_comparison(["runs/a", "runs/b"], results, [first, second])
    assert "A: runs/a\nB: runs/b\nmodel: A 'one', B 'two'\n" in text and "seed" not in text
    assert "of 5 questions in both, 1 are better in B, 1 worse; B - A: +0.000" in text
    assert "b: A (0.000) -> B (1.000)" in text and "c: A (1.000) -> no answer (0.000)" in text
    assert "e: e.mp4: broken (-) -> A (1.000)" in text and "only in A (1): gone" in text


def test_protocol_in_one_line():
    protocol = {
        "model": "m",
        "system_prompt": "none",
        "max_completion_length": 64,
        "temperature": 0.0,
        "num_samples": 1,
        "benchmark": None,
        "senses": ["video", "audio"],
        "media": {"max_frames": 32, "fps": 2.0, "max_pixels": 100352, "interleave_audio": False},
    }
    assert format_protocol(protocol) == (
        "model m, system_prompt none, max_completion_length 64, max_frames 32, fps 2.0, max_pixels 100352, temperature 0.0, "
        "sound after the video"
    )
    sampled = protocol | {"temperature": 0.9, "top_p": 1.0, "top_k": 50, "num_samples": 8, "seed": 0}
    assert "temperature 0.9, top_p 1.0, top_k 50, num_samples 8, seed 0, sound after" in format_protocol(sampled)
    assert format_protocol(protocol | {"senses": ["video"]}).endswith("picture only")


def test_a_benchmark_s_protocol_is_told_beside_the_paper_s():
    media = {"max_frames": 32, "fps": 2.0, "max_pixels": 200704, "interleave_audio": False}
    protocol = {
        "model": "m",
        "system_prompt": "hov2",
        "max_completion_length": 2048,
        "temperature": 0.0,
        "num_samples": 1,
        "benchmark": "daily-omni",
        "senses": ["video", "audio"],
        "media": media,
    }
    open_ = "; the paper doesn't say: max_pixels (here 200704), decoding (here greedy)"
    assert format_protocol(protocol).splitlines()[1] == f"protocol: the paper's where it is known{open_}"
    other = protocol | {"media": media | {"max_frames": 64, "interleave_audio": True}, "max_completion_length": 64}
    assert format_protocol(other).splitlines()[1] == (
        "unlike the paper's protocol: max_frames 64 (paper 32), interleave_audio True (paper False), "
        f"max_completion_length 64 (paper 2048){open_}"
    )
