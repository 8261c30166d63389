"""What the records of an evaluation add up to: means with intervals, votes, comparisons, and their tables.

Pure functions. A record is one line of predictions.jsonl (evaluator.py): one question with one answer, or with several
under `samples`. A value that is unknown or doesn't apply is None and left out of every mean.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

DRAWS = 1000  # of a bootstrap
SHOWN = 5  # ids that a message names
SCORES = ("accuracy", "format", "context")  # of an answer
COUNTS = ("no_answer", "truncated")


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there; None if none is."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    return math.fsum(present) / len(present)


def interval(values: Iterable[float | None], seed: int = 0) -> list[float] | None:
    """Return [low, high], the 95 % bootstrap interval of the mean over the questions; None without a value.

    The questions are drawn anew, with replacement, 1,000 times; equal values give an equal interval.
    """
    present = np.array([value for value in values if value is not None], float)
    if not len(present):
        return None
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(DRAWS):
        drawn = rng.integers(len(present), size=len(present))
        means.append(present[drawn].mean())
    return [round(float(bound), 6) for bound in np.percentile(means, [2.5, 97.5])]


def majority(votes: list) -> int:
    """Return the position of the first vote for what most voted for (of equals, what was said first).

    None is no vote; the position is 0 if all are None.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0
    elected = max(counts, key=counts.get)  # of equals the first: a Counter keeps the order of first votes
    return votes.index(elected)


def over_samples(answers: list[dict]) -> dict:
    """Return what a record says of several answers to its question: mean scores, and the answer of the majority.

    `pass` is the best sample's accuracy (with scores of 0 and 1: whether any was right), `majority` that of the answer
    which most samples agree on; `no_answer` and `truncated` count samples.
    """
    elected = answers[majority([answer["parsed"] for answer in answers])]
    accuracies = [answer["accuracy"] for answer in answers if answer["accuracy"] is not None]
    said = dict(elected)
    for name in SCORES:
        said[name] = mean(answer[name] for answer in answers)
    said["pass"] = max(accuracies, default=None)
    said["majority"] = elected["accuracy"]
    for name in COUNTS:
        said[name] = _count(answer[name] for answer in answers)
    said["samples"] = answers
    return said


def _count(flags: Iterable[int | None]) -> int | None:
    """Return the sum of what was counted; None if it isn't known of all."""
    flags = list(flags)
    if None in flags:
        return None
    return sum(flags)


def answers_of(record: dict) -> list[dict]:
    """Return the answers that a record holds: none (an unreadable clip), itself, or its samples."""
    if record["error"]:
        return []
    return record.get("samples", [record])


def summarize(records: list[dict]) -> dict:
    """Return scores of all records with their intervals, accuracy by problem type, and counts of what is missing."""
    answers = []
    num_samples = 0
    for record in records:
        found = answers_of(record)
        answers.extend(found)
        num_samples = max(num_samples, len(found))

    fields = {"accuracy": "accuracy"}  # {score: field of a record}
    if num_samples > 1:
        fields[f"mean@{num_samples}"] = "accuracy"
        fields[f"pass@{num_samples}"] = "pass"
        fields[f"majority@{num_samples}"] = "majority"

    summary = {"questions": len(records), "answers": len(answers)}
    intervals = {}
    for name, field in fields.items():
        values = [record.get(field) for record in records]
        summary[name] = mean(values)
        intervals[name] = interval(values)
    summary["intervals"] = intervals
    for name in ("format", "context"):
        summary[name] = mean(record[name] for record in records)
    summary["by_problem_type"] = _by_problem_type(records)
    for name in COUNTS:
        summary[name] = _count(answer[name] for answer in answers)
    summary["unscored"] = sum(answer["accuracy"] is None for answer in answers)
    summary["unreadable"] = sum(bool(record["error"]) for record in records)
    return summary


def _by_problem_type(records: list[dict]) -> dict[str, dict]:
    accuracies = {}
    for record in records:
        accuracies.setdefault(record["problem_type"], []).append(record["accuracy"])
    found = {}
    for kind, values in sorted(accuracies.items()):
        found[kind] = {"questions": len(values), "accuracy": mean(values), "interval": interval(values)}
    return found


def compare(first: list[dict], second: list[dict]) -> dict:
    """Return what changed between the records of two evaluations.

    Questions are matched by id (equal ids by their order). `pairs` are the records of questions that both have,
    `changed` the pairs whose accuracy differs, `only` the ids that one alone has: [of the first, of the second].
    `difference` is that of the mean accuracies, second minus first, over questions that have one in both, and
    `interval` its interval; `better` and `worse` count such questions.
    """
    first = _by_id(first)
    second = _by_id(second)
    pairs = [(record, second[key]) for key, record in first.items() if key in second]
    changed = [(before, after) for before, after in pairs if before["accuracy"] != after["accuracy"]]
    steps = []
    for before, after in pairs:
        if before["accuracy"] is not None and after["accuracy"] is not None:
            steps.append(after["accuracy"] - before["accuracy"])
    only_first = [name for name, number in first if (name, number) not in second]
    only_second = [name for name, number in second if (name, number) not in first]
    return {
        "pairs": pairs,
        "changed": changed,
        "better": sum(step > 0 for step in steps),
        "worse": sum(step < 0 for step in steps),
        "difference": mean(steps),
        "interval": interval(steps),
        "only": [only_first, only_second],
    }


def _by_id(records: list[dict]) -> dict[tuple[str, int], dict]:
    """Return {(id, how many times this id has come so far): record}."""
    seen = Counter()
    found = {}
    for record in records:
        seen[record["id"]] += 1
        found[record["id"], seen[record["id"]]] = record
    return found


def differing(first: dict, second: dict) -> dict[str, tuple]:
    """Return {key: (value in the first, value in the second)} of what two protocols don't have in common."""
    return {key: (first.get(key), second.get(key)) for key in first | second if first.get(key) != second.get(key)}


# ---- Tables ----


def some(names: Iterable[str]) -> str:
    """Return the first few of the names, and how many more there are, as text."""
    names = list(names)
    text = ", ".join(names[:SHOWN])
    if len(names) > SHOWN:
        text += f" and {len(names) - SHOWN} more"
    return text


def table(rows: Sequence[Sequence]) -> str:
    """Return rows of cells as text, each column as wide as it needs: the first to the left, the others to the right."""
    widths = []
    for column in zip(*rows):
        widths.append(max(len(str(cell)) for cell in column))
    lines = []
    for name, *cells in rows:
        line = f"{name:<{widths[0]}}"
        for cell, width in zip(cells, widths[1:]):
            line += f"  {cell:>{width}}"
        lines.append(line)
    return "\n".join(lines)


def format_summary(summary: dict) -> str:
    """Return the summary as a text table."""
    rows = [("problem type", *SCORE_CELLS)]
    for name, cells in _scores_of(summary).items():
        rows.append((name, *cells))
    others = [f"{name}: {number(summary[name])}" for name in ("format", "context")]
    for name in (*COUNTS, "unscored", "unreadable"):
        count = "not known" if summary[name] is None else summary[name]
        others.append(f"{name.replace('_', ' ')}: {count}")
    return table(rows) + "\n" + ", ".join(others)


SCORE_CELLS = ("questions", "accuracy", "95 % interval")
NO_SCORE = (0, "-", "-")


def _scores_of(summary: dict) -> dict[str, tuple[int, str, str]]:
    """Return the SCORE_CELLS, as text, of each problem type, then of each score over all questions."""
    cells = {}
    for kind, row in summary["by_problem_type"].items():
        cells[kind] = row["questions"], number(row["accuracy"]), bounds(row["interval"])
    for name, pair in summary["intervals"].items():
        label = "all" if name == "accuracy" else name
        cells[label] = summary["questions"], number(summary[name]), bounds(pair)
    return cells


# Of the paper's evaluation, what is known: https://arxiv.org/abs/2506.21277, the authors' answers and their code.
PAPER = {
    "max_frames": 32,
    "fps": 2.0,
    "interleave_audio": False,  # the sound is an item of its own, after the video
    "senses": ["video", "audio"],
    "max_completion_length": 2048,
    "num_samples": 1,
}


def format_protocol(protocol: dict) -> str:
    """Return one line that says how the answers were had; for a benchmark, a second one: in what unlike the paper's."""
    if "answers" in protocol:
        return f"answers of {protocol['answers']}; with which frames, words and decoding isn't known here"
    names = ["model", "system_prompt", "max_completion_length", "max_frames", "fps", "max_pixels", "temperature"]
    if protocol["temperature"]:  # else greedy
        names += ["top_p", "top_k", "num_samples", "seed"]
    values = protocol | protocol["media"]
    parts = [f"{name} {values[name]}" for name in names]
    if values["senses"] == ["video"]:
        parts.append("picture only")
    elif values["senses"] == ["audio"]:
        parts.append("sound only")
    else:
        parts.append("sound in time with the video" if values["interleave_audio"] else "sound after the video")
    line = ", ".join(parts)
    if protocol["benchmark"]:
        line += f"\n{_beside_paper(values)}"
    return line


def _beside_paper(values: dict) -> str:
    """Return a line that says in what a protocol's values differ from the paper's, and what the paper leaves open."""
    unlike = [f"{name} {values[name]} (paper {known})" for name, known in PAPER.items() if values[name] != known]
    decoding = "sampled" if values["temperature"] else "greedy"
    line = f"unlike the paper's protocol: {', '.join(unlike)}" if unlike else "protocol: the paper's where it is known"
    return f"{line}; the paper doesn't say: max_pixels (here {values['max_pixels']}), decoding (here {decoding})"


def format_errors(records: list[dict]) -> str:
    """Return a line for each of the first questions that could not be asked, and how many more there are."""
    failed = [record for record in records if record["error"]]
    lines = [f"not asked: {record['id']}: {record['error']}" for record in failed[:SHOWN]]
    if len(failed) > SHOWN:
        lines.append(f"not asked: {len(failed) - SHOWN} more, in predictions.jsonl with their `error`")
    return "\n".join(lines)


def format_comparison(names: Sequence[str], results: Sequence[dict], records: Sequence[list[dict]]) -> str:
    """Return two evaluations side by side: `names`, `results` (results.json) and `records` (predictions.jsonl)."""
    found = compare(*records)
    lines = [f"A: {names[0]}", f"B: {names[1]}"]
    for key, (first, second) in differing(results[0]["protocol"], results[1]["protocol"]).items():
        lines.append(f"{key}: A {first!r}, B {second!r}")

    first_scores = _scores_of(results[0])
    second_scores = _scores_of(results[1])
    header = [f"A {cell}" for cell in SCORE_CELLS] + [f"B {cell}" for cell in SCORE_CELLS]
    rows = [("", *header)]
    for name in first_scores | second_scores:
        rows.append((name, *first_scores.get(name, NO_SCORE), *second_scores.get(name, NO_SCORE)))
    lines += ["", table(rows), ""]

    lines.append(
        f"of {len(found['pairs'])} questions in both, {found['better']} are better in B, {found['worse']} worse; "
        f"B - A: {number(found['difference'], '+')}  {bounds(found['interval'], '+')}"
    )
    for before, after in found["changed"]:
        lines.append(f"{before['id']}: {_said(before)} -> {_said(after)}")
    for letter, ids in zip("AB", found["only"]):
        if ids:
            lines.append(f"only in {letter} ({len(ids)}): {some(ids)}")
    return "\n".join(lines)


def _said(record: dict) -> str:
    """Return the beginning of what a record's answer is, or why there is none, with its accuracy."""
    said = record["error"] or record["parsed"] or record["answer"] or "no answer"
    return f"{' '.join(said.split()):.40} ({number(record['accuracy'])})"


def number(value: float | None, sign: str = "") -> str:
    """Return a score as text, "-" if there is none; `sign` "+": with its sign."""
    return "-" if value is None else f"{value:{sign}.3f}"


def bounds(pair: Sequence[float] | None, sign: str = "") -> str:
    """Return an interval as text, "-" if there is none."""
    return "-" if pair is None else f"{pair[0]:{sign}.3f} to {pair[1]:{sign}.3f}"
