"""What the records of an evaluation add up to: means with intervals, votes, the difficulty filter, comparisons, tables.

Pure functions. A record is one line of predictions.jsonl (evaluation.py): one question with one answer, or with several
under `samples`. A value that is unknown or doesn't apply is None and left out of every mean.
"""

import math
from collections import Counter

import numpy as np

DRAWS = 1000  # of a bootstrap
SCORES = ("accuracy", "exact", "format", "context")  # of an answer
COUNTS = ("no_answer", "truncated")


def mean(values):
    """The mean of the values that are there; None if none is."""
    present = [v for v in values if v is not None]
    return math.fsum(present) / len(present) if present else None


def interval(values, seed=0):
    """[low, high], the 95 % bootstrap interval of the mean over the questions; None without a value.

    The questions are drawn anew, with replacement, 1,000 times; equal values give an equal interval.
    """
    present = np.array([v for v in values if v is not None], float)
    if not len(present):
        return None
    rng = np.random.default_rng(seed)
    means = [present[rng.integers(len(present), size=len(present))].mean() for _ in range(DRAWS)]
    return [round(float(bound), 6) for bound in np.percentile(means, [2.5, 97.5])]


def majority(votes):
    """The position of the first vote for what most voted for (of equals, what was said first); 0 if all are None."""
    counts = Counter(vote for vote in votes if vote is not None)  # keeps the order of first votes
    return votes.index(max(counts, key=counts.get)) if counts else 0


def over_samples(answers):
    """What a record says of several answers to its question: mean scores, and the answer that the majority gave.

    `pass` is the best sample's accuracy (with scores of 0 and 1: whether any was right), `majority` that of the answer
    which most samples agree on; `no_answer` and `truncated` count samples.
    """
    elected = answers[majority([a["parsed"] for a in answers])]
    return elected | {name: mean(a[name] for a in answers) for name in SCORES} | {
        "pass": max((a["accuracy"] for a in answers if a["accuracy"] is not None), default=None),
        "majority": elected["accuracy"],
        **{name: sum(a[name] for a in answers) for name in COUNTS},
        "samples": answers,
    }


def answers_of(record):
    """The answers that a record holds: none (an unreadable clip), itself, or its samples."""
    return [] if record["error"] else record.get("samples", [record])


def summarize(records):
    """Scores of all records with their intervals, accuracy by problem type, and counts of what is missing."""
    answers = [answer for record in records for answer in answers_of(record)]
    samples = max((len(answers_of(record)) for record in records), default=1)
    names = {"accuracy": "accuracy", "exact": "exact"}
    if samples > 1:
        names |= {f"mean@{samples}": "accuracy", f"pass@{samples}": "pass", f"majority@{samples}": "majority"}
    columns = {name: [record.get(key) for record in records] for name, key in names.items()}
    kinds = {kind: [r["accuracy"] for r in records if r["problem_type"] == kind]
             for kind in sorted({r["problem_type"] for r in records})}
    return {
        "questions": len(records), "answers": len(answers),
        **{name: mean(values) for name, values in columns.items()},
        "intervals": {name: interval(values) for name, values in columns.items()},
        **{name: mean(r[name] for r in records) for name in ("format", "context")},
        "by_problem_type": {kind: {"questions": len(values), "accuracy": mean(values), "interval": interval(values)}
                            for kind, values in kinds.items()},
        **{name: sum(a[name] for a in answers) for name in COUNTS},
        "unscored": sum(a["accuracy"] is None for a in answers),
        "unreadable": sum(bool(r["error"]) for r in records),
    }


def share_right(record, threshold):
    """The share of a record's scored answers with an accuracy above `threshold`; None without a scored answer."""
    scores = [a["accuracy"] for a in answers_of(record) if a["accuracy"] is not None]
    return sum(score > threshold for score in scores) / len(scores) if scores else None


def keep(record, rule):
    """What the difficulty filter `rule` (config.FilterConfig) says of a question: kept, too easy, too hard, unknown."""
    share = share_right(record, rule.threshold)
    if share is None:
        return "unknown"
    return "too hard" if share <= rule.min_share else "too easy" if share >= rule.max_share else "kept"


def compare(first, second):
    """What changed between the records of two evaluations: `changed` and `same` questions, and those of one alone.

    Questions are matched by id (equal ids by their order). `changed`: pairs of records whose accuracy differs.
    `difference`: of the mean accuracies, second minus first, over questions that have one in both, and its interval.
    """
    first, second = _by_id(first), _by_id(second)
    pairs = [(record, second[key]) for key, record in first.items() if key in second]
    steps = [b["accuracy"] - a["accuracy"] for a, b in pairs if None not in (a["accuracy"], b["accuracy"])]
    return {
        "pairs": pairs, "changed": [(a, b) for a, b in pairs if a["accuracy"] != b["accuracy"]],
        "better": sum(step > 0 for step in steps), "worse": sum(step < 0 for step in steps),
        "difference": mean(steps), "interval": interval(steps),
        "only": [[key[0] for key in one if key not in other] for one, other in ((first, second), (second, first))],
    }


def _by_id(records):
    seen = Counter()
    return {(r["id"], seen.update([r["id"]]) or seen[r["id"]]): r for r in records}


def differing(first, second):
    """{key: (value in the first, value in the second)} of what two protocols don't have in common."""
    return {key: (first.get(key), second.get(key)) for key in first | second if first.get(key) != second.get(key)}


# ---- Tables ----


def table(rows):
    """Rows of cells as text, each column as wide as it needs: the first one to the left, the others to the right."""
    first, *others = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    return "\n".join(f"{name:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, others))
                     for name, *cells in rows)


def format_summary(summary):
    """The summary as a text table."""
    rows = [(name, *cells) for name, cells in _scores_of(summary).items()]
    others = [f"{name}: {_number(summary[name])}" for name in ("format", "context")]
    others += [f"{name.replace('_', ' ')}: {summary[name]}" for name in (*COUNTS, "unscored", "unreadable")]
    return table([("problem type", *SCORE_CELLS), *rows]) + "\n" + ", ".join(others)


SCORE_CELLS = ("questions", "accuracy", "95 % interval")
NO_SCORE = (0, "-", "-")


def _scores_of(summary):
    """{name: SCORE_CELLS as text} of each problem type, then of each score over all questions."""
    rows = {kind: (row["questions"], row["accuracy"], row["interval"])
            for kind, row in summary["by_problem_type"].items()}
    rows |= {"all" if name == "accuracy" else name: (summary["questions"], summary[name], bounds)
             for name, bounds in summary["intervals"].items()}
    return {name: (questions, _number(score), _bounds(bounds)) for name, (questions, score, bounds) in rows.items()}


def format_protocol(protocol):
    """One line that says how the answers were had."""
    names = ("model", "system_prompt", "max_new_tokens", "max_frames", "fps", "max_pixels", "temperature")
    names += ("top_p", "top_k", "num_samples", "seed") if protocol["temperature"] else ()  # else greedy
    return ", ".join(f"{name} {(protocol | protocol['media'])[name]}" for name in names)


def format_filter(records, rule):
    """What the difficulty filter leaves, by problem type."""
    verdicts = Counter((kind, keep(r, rule)) for r in records for kind in (r["problem_type"], "all"))
    names = ("kept", "too easy", "too hard", "unknown")
    kinds = (*sorted({r["problem_type"] for r in records}), "all")
    return table([("problem type", *names), *((kind, *(verdicts[kind, name] for name in names)) for kind in kinds)])


def format_comparison(names, results, records):
    """Two evaluations side by side: `names`, `results` (results.json) and `records` (predictions.jsonl) of each."""
    found = compare(*records)
    lines = [f"{letter}: {name}" for letter, name in zip("AB", names)]
    lines += [f"{key}: A {a!r}, B {b!r}" for key, (a, b) in differing(*(r["protocol"] for r in results)).items()]
    one, other = map(_scores_of, results)
    rows = [(name, *one.get(name, NO_SCORE), *other.get(name, NO_SCORE)) for name in one | other]
    lines.append("\n" + table([("", *(f"{name} {cell}" for name in "AB" for cell in SCORE_CELLS)), *rows]))
    lines.append(f"\nof {len(found['pairs'])} questions in both, {found['better']} are better in B, {found['worse']} "
                 f"worse; B - A: {_number(found['difference'], '+')}  {_bounds(found['interval'], '+')}")
    lines += [f"{a['id']}: {_said(a)} -> {_said(b)}" for a, b in found["changed"]]
    lines += [f"only in {letter} ({len(ids)}): {', '.join(ids[:5])}" for letter, ids in zip("AB", found["only"]) if ids]
    return "\n".join(lines)


def _said(record):
    said = record["error"] or record["parsed"] or record["answer"] or "no answer"
    return f"{' '.join(said.split()):.40} ({_number(record['accuracy'])})"


def _number(value, sign=""):
    return "-" if value is None else f"{value:{sign}.3f}"


def _bounds(pair, sign=""):
    return "-" if pair is None else f"{pair[0]:{sign}.3f} to {pair[1]:{sign}.3f}"
