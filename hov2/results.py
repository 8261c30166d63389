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
        "only_first": [key[0] for key in first if key not in second],
        "only_second": [key[0] for key in second if key not in first],
    }


def _by_id(records):
    seen = Counter()
    return {(r["id"], seen.update([r["id"]]) or seen[r["id"]]): r for r in records}


# ---- Tables ----


def format_summary(summary):
    """The summary as a text table."""
    rows = [(kind, row["questions"], row["accuracy"], row["interval"])
            for kind, row in summary["by_problem_type"].items()]
    bounds = summary["intervals"]
    rows.append(("all", summary["questions"], summary["accuracy"], bounds["accuracy"]))
    lines = [f"{'problem type':<18}{'questions':>10}{'accuracy':>10}  95 % interval"]
    lines += [f"{kind:<18}{count:>10}{_number(accuracy):>10}  {_bounds(pair)}" for kind, count, accuracy, pair in rows]
    lines += [f"{name:<28}{_number(summary[name]):>10}  {_bounds(bounds[name])}"
              for name in bounds if name != "accuracy"]
    counts = ", ".join(f"{name.replace('_', ' ')}: {summary[name]}" for name in (*COUNTS, "unscored", "unreadable"))
    return "\n".join([*lines, f"format {_number(summary['format'])}, context {_number(summary['context'])}; {counts}"])


def format_protocol(protocol):
    """One line that says how the answers were had."""
    media = protocol["media"]
    how = "greedy" if not protocol["temperature"] else "temperature {temperature:g}, top_p {top_p:g}, top_k {top_k}, " \
          "{num_samples} samples, seed {seed}".format(**protocol)
    return (f"{protocol['model']}, system prompt {protocol['system_prompt']!r}, {how}; at most "
            f"{protocol['max_new_tokens']} new tokens, {media['max_frames']} frames, {media['fps']:g} a second, "
            f"of {media['max_pixels']} pixels")


def format_filter(records, rule):
    """What the difficulty filter leaves, by problem type."""
    verdicts = Counter((kind, keep(r, rule)) for r in records for kind in (r["problem_type"], "all"))
    names = ("kept", "too easy", "too hard", "unknown")
    lines = [f"{'problem type':<18}" + "".join(f"{name:>10}" for name in names)]
    lines += [f"{kind:<18}" + "".join(f"{verdicts[kind, name]:>10}" for name in names)
              for kind in (*sorted({r["problem_type"] for r in records}), "all")]
    return "\n".join(lines)


def format_comparison(names, results, records):
    """Two evaluations side by side: `names`, `results` (results.json) and `records` (predictions.jsonl) of each."""
    found = compare(*records)
    lines = [f"{letter}: {name}" for letter, name in zip("AB", names)]
    protocols = [result["protocol"] for result in results]
    for key in dict.fromkeys([*protocols[0], *protocols[1]]):
        if protocols[0].get(key) != protocols[1].get(key):
            lines.append(f"{key}: A {protocols[0].get(key)!r}, B {protocols[1].get(key)!r}")
    lines.append(f"\n{'':<28}{'questions':>14}{'A':>24}{'B':>24}")
    by_kind = [result["by_problem_type"] for result in results]
    for kind in sorted({*by_kind[0], *by_kind[1]}):
        lines.append(_side_by_side(kind, [rows.get(kind) for rows in by_kind]))
    for name in [n for n in results[0]["intervals"] if n in results[1]["intervals"]]:
        lines.append(_side_by_side(name, [{"questions": r["questions"], "accuracy": r[name],
                                           "interval": r["intervals"][name]} for r in results]))
    lines.append(f"\nof {len(found['pairs'])} questions in both, {found['better']} are better in B, {found['worse']} "
                 f"worse; B - A: {_number(found['difference'], '+')}  {_bounds(found['interval'], '+')}")
    for a, b in found["changed"]:
        lines.append(f"{a['id']}: {_said(a)} -> {_said(b)}")
    for letter, key in (("A", "only_first"), ("B", "only_second")):
        if found[key]:
            lines.append(f"only in {letter} ({len(found[key])}): {', '.join(found[key][:5])}"
                         + (", ..." if len(found[key]) > 5 else ""))
    return "\n".join(lines)


def _side_by_side(name, rows):
    questions = "/".join(dict.fromkeys(str(row["questions"] if row else 0) for row in rows))
    cells = [f"{_number(row['accuracy'])}  {_bounds(row['interval'])}" if row else "-" for row in rows]
    return f"{name:<28}{questions:>14}" + "".join(f"{cell:>24}" for cell in cells)


def _said(record):
    said = record["error"] or record["parsed"] or record["answer"] or "no answer"
    said = " ".join(said.split())
    return f"{said if len(said) <= 40 else said[:37] + '...'} ({_number(record['accuracy'])})"


def _number(value, sign=""):
    return "-" if value is None else f"{value:{sign}.3f}"


def _bounds(pair, sign=""):
    return "-" if pair is None else f"{pair[0]:{sign}.3f} to {pair[1]:{sign}.3f}"
