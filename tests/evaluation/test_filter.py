"""The difficulty filter: its bounds, what it can't know, its table, and the data that it writes."""

import pytest

from hov2.config import FilterConfig, Source
from hov2.data.formats import DataError
from hov2.data.samples import Sample, read_samples
from hov2.evaluation.filter import format_filter, keep, share_right, write_filtered
from tests.support.evalkit import answer, record


@pytest.mark.parametrize(
    "right, verdict", [(0, "too hard"), (1, "kept"), (5, "kept"), (6, "too easy"), (8, "too easy")]
)
def test_filter_bounds_are_open(right, verdict):
    samples = [answer(1.0)] * right + [answer(0.2)] * (8 - right)  # 0.2 is not above the threshold
    found = record("a", samples=samples)
    assert share_right(found, 0.2) == right / 8
    assert keep(found, FilterConfig("x.jsonl")) == verdict


def test_filter_leaves_out_what_is_missing():
    half = record("a", samples=[answer(1.0), answer(0.0), answer(None)])
    assert share_right(half, 0.2) == 0.5  # of the scored ones
    unknown = [record("b", samples=[answer(None)] * 2), record("c", error="gone")]
    assert [keep(r, FilterConfig("x.jsonl")) for r in unknown] == ["unknown"] * 2
    table = format_filter([half, *unknown], FilterConfig("x.jsonl")).splitlines()
    assert table[0].split() == ["problem", "type", "kept", "too", "easy", "too", "hard", "unknown"]
    assert table[-1].split() == ["all", "1", "0", "0", "2"]


def test_filtered_data_can_be_read_and_says_the_same(tmp_path):
    samples = []
    for number in range(20):
        paths = {"video": f"/clips/{number}.mp4"} if number % 4 else {}
        kind = "video" if paths else "text"
        options = ("A. one", "B. two")
        samples.append(Sample(f"q{number}", "What?", "judge", options, "<answer>yes</answer>", kind, paths))
    extra = Sample(
        "i",
        "What is heard?",
        "multiple choice",
        ("A. one", "B. two"),
        "<think>y</think><answer>B</answer>",
        "image_audio",
        {"image": "/a/1.png", "audio": "/a/1.wav"},
        extra={"answer": "B"},
    )
    asked = [*samples, extra]
    records = [
        {"error": None, "samples": [{"accuracy": float(k < i % 9)} for k in range(8)]} for i in range(len(asked))
    ]
    rule = FilterConfig(str(tmp_path / "next" / "kept.jsonl"))
    expected = [s for i, s in enumerate(asked) if 0 < i % 9 < 6]
    assert write_filtered(rule, asked, records) == len(expected)
    kept = read_samples([Source(rule.output)])
    for a, b in zip(expected, kept, strict=True):
        share = b.extra.pop("share_right")
        assert 0 < share < 0.75 and (
            a.id,
            a.problem,
            a.problem_type,
            a.options,
            a.solution,
            a.data_type,
            a.paths,
            a.extra,
        ) == (b.id, b.problem, b.problem_type, b.options, b.solution, b.data_type, b.paths, b.extra)
    assert any(s.paths for s in kept) and any(not s.paths for s in kept)
    with pytest.raises(DataError, match="no question has a share of right answers between 0.0 and 0.75"):
        write_filtered(rule, asked[:1], [{"error": "gone"}])
