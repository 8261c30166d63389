"""Benchmarks' results as text: the paper's table, what others published, partial sets; and the published figures."""

import re

import pytest

from hov2.evaluation.benchmarks import PUBLISHED, columns
from hov2.evaluation.tables import partial, render
from tests.support.evalkit import benchmark_record as record


def published(name, row):
    """A row of the paper's table."""
    return PUBLISHED[name]["published"][0]["rows"][row]


def published_records(name, row):
    """Records with the published accuracy of each column, as many as the benchmark has questions in it."""
    about, fields = PUBLISHED[name], {"question": "Type", "type": "Type"}
    accuracies = published(name, row)
    return accuracies[-1], [
        record(value / 100, {fields[table]: label})
        for (table, label, count), value in zip(about["columns"].values(), accuracies)
        if table in fields
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    "name, row",
    [
        ("intentbench", "HumanOmniV2"),
        ("intentbench", "  SFT only"),
        ("intentbench", "Qwen2.5-Omni 7B"),
        ("daily-omni", "HumanOmniV2"),
        ("daily-omni", "Qwen2.5-Omni 7B"),
    ],
)
def test_published_columns_and_counts_give_the_published_average(name, row):
    average, records = published_records(name, row)
    assert len(records) == PUBLISHED[name]["questions"] and not partial(name, records)
    score, count = columns(name, records)["paper"]["Avg"]
    assert count == len(records) and 100 * score == pytest.approx(average, abs=0.02)


def test_what_is_published():
    assert published("intentbench", "HumanOmniV2")[-1] == 69.33 and published("daily-omni", "HumanOmniV2")[-1] == 58.47
    for name, about in PUBLISHED.items():
        counts = [count for *_, count in about["columns"].values()]
        assert about["questions"] == {"intentbench": 2689, "daily-omni": 1197, "worldsense": 3172}[name]
        assert sum(counts[:6] if name == "daily-omni" else counts) == about["questions"]
        for source in about["published"]:
            assert source.keys() == {"source", "date", "rows"} and source["source"] and source["rows"]
            assert source["date"] is None or re.fullmatch(r"20\d\d-\d\d", source["date"])
            for accuracies in source["rows"].values():
                many = accuracies if isinstance(accuracies, list) else [accuracies]
                assert len(many) in (1, len(counts) + 1) and all(0 < value < 100 for value in many)
    assert PUBLISHED["daily-omni"]["columns"]["30s"][-1] + PUBLISHED["daily-omni"]["columns"]["60s"][-1] == 1197


@pytest.mark.parametrize(
    "name, row, of_columns, printed",
    [
        ("intentbench", "MiniCPM-o 8B", 55.11, 54.51),
        ("daily-omni", "MiniCPM-o 7B", 52.79, 53.13),
        ("worldsense", "HumanOmniV2", 47.04, 47.1),
    ],
)
def test_the_notes_on_the_paper_s_own_sums_are_right(name, row, of_columns, printed):
    columns_of = [count for of, _, count in PUBLISHED[name]["columns"].values() if of != "duration"]
    accuracies = published(name, row)
    total = sum(count * accuracy for count, accuracy in zip(columns_of, accuracies))
    assert total / PUBLISHED[name]["questions"] == pytest.approx(of_columns, abs=0.006)
    assert accuracies[-1] == printed and any(str(of_columns) in note for note in PUBLISHED[name]["notes"])


def test_six_of_humanomniv2_s_worldsense_columns_are_no_share_of_their_questions():
    impossible = 0
    for accuracy, (*_, count) in zip(
        published("worldsense", "HumanOmniV2"), PUBLISHED["worldsense"]["columns"].values()
    ):
        shares = {round(100 * right / count, 1) for right in range(count + 1)}
        impossible += accuracy not in shares
    assert impossible == 6


@pytest.mark.parametrize(
    "row, official",
    [
        ("Qwen2.5-Omni 7B", (46.68, 48.36)),
        ("Qwen2.5-Omni 3B", (42.35, 38.36)),
        ("Gemini 2.0 Flash", (67.23, 68.55)),
        ("Gemini 2.0 Flash Lite", (62.44, 60.00)),
    ],
)
def test_the_official_durations_fit_the_average_where_the_paper_s_do_not(row, official):
    *_, short, long, average = published("daily-omni", row)
    assert (647 * official[0] + 550 * official[1]) / 1197 == pytest.approx(average, abs=0.02)
    assert (647 * short + 550 * long) / 1197 != pytest.approx(average, abs=1)


# ---- partial sets, the report ----


def test_partial_sets_are_said():
    few = [record(1, {"Type": "Reasoning"})] * 5 + [record(None, error="no such file", completion=None, answer=None)]
    assert partial("daily-omni", few) == (
        "Daily-Omni has 1,197 published questions; this score is over 5, 1 more have none"
    )
    text = render("daily-omni", few)
    assert text.startswith("WARNING: Daily-Omni has 1,197") and "\nthis run (partial) " in text
    _, full = published_records("daily-omni", "HumanOmniV2")
    assert "WARNING" not in render("daily-omni", full) and "partial" not in render("daily-omni", full)
    assert "over 1,196, 1 more have none" in partial("daily-omni", [record(None), *full[1:]])
    assert "over 1,198" in partial("daily-omni", [*full, full[0]])
    assert partial("daily-omni", []) and "this run (partial)" in render("daily-omni", [])


def test_report():
    _, full = published_records("daily-omni", "HumanOmniV2")
    lines = render("daily-omni", full).splitlines()
    rows = {label: cells for label, *cells in (re.split(r"  +", line.strip()) for line in lines)}
    assert rows["this run"] == ["46.63", "67.93", "51.81", "51.63", "72.72", "74.28", "-", "-", "58.47"]
    assert rows["questions"] == ["238", "131", "193", "306", "154", "175", "0", "0", "1197"]
    assert rows["questions, published"] == ["238", "131", "193", "306", "154", "175", "647", "550", "1197"]
    assert rows["95 % from"][-3:-1] == ["-", "-"] and float(rows["95 % from"][-1]) < 58.47 < float(rows["95 % to"][-1])
    assert rows["HumanOmniV2"] == ["46.63", "67.93", "51.81", "51.63", "72.72", "74.28", "63.06", "53.09", "58.47"]
    assert rows["GPT-4o, no sound (official)"][0] == "47.90" and rows["GPT-4o, no sound (official)"][-1] == "56.47"
    text = render("daily-omni", [record(1, {"video_category": "Comedy"})])
    assert re.search("^Comedy +1 +100.00 +100.00 +100.00$", text, re.MULTILINE)
    for name, average in (("intentbench", "69.33"), ("worldsense", "47.1")):
        [row] = [line for line in render(name, [record(1)]).splitlines() if line.startswith("HumanOmniV2 ")]
        assert row.split()[-1] == average


def test_figures_of_others_stand_below_with_source_and_date():
    text = render("daily-omni", [record(1)])
    assert "\n  Daily-Omni's README (2026-03): Qwen2.5-Omni 7B 62.07, Qwen2.5-Omni 3B 60.23\n" in text
    assert (
        "published rows: the HumanOmniV2 paper, arXiv 2506.21277 (2025-06); Daily-Omni's leaderboard (date not " in text
    )
    assert "HumanOmniV2's 58.47 is below what the benchmark's authors now give its base model" in text
    text = render("worldsense", [record(1)])
    assert "over 3,142 questions (date not known): HumanOmniV2 47.07" in text and "VLMEvalKit" not in text
    for name in PUBLISHED:
        assert max(len(line) for line in render(name, [record(1)]).splitlines()) < 250
        assert len(render(name, [record(1)]).splitlines()) < 70
