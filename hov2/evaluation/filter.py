"""The difficulty filter: questions that some, but not most, of a model's answers get right, for the next stage."""

import json
from collections import Counter
from pathlib import Path

from hov2.config import FilterConfig
from hov2.data.formats import DataError
from hov2.data.samples import Sample
from hov2.distributed import atomic_write
from hov2.evaluation.results import answers_of, table

VERDICTS = ("kept", "too easy", "too hard", "unknown")


def share_right(record: dict, threshold: float) -> float | None:
    """Return the share of a record's scored answers with an accuracy above `threshold`; None without a scored one."""
    scores = [answer["accuracy"] for answer in answers_of(record) if answer["accuracy"] is not None]
    if not scores:
        return None
    return sum(score > threshold for score in scores) / len(scores)


def keep(record: dict, rule: FilterConfig) -> str:
    """Return what the filter says of a question: one of VERDICTS."""
    share = share_right(record, rule.threshold)
    if share is None:
        return "unknown"
    if share <= rule.min_share:
        return "too hard"
    if share >= rule.max_share:
        return "too easy"
    return "kept"


def format_filter(records: list[dict], rule: FilterConfig) -> str:
    """Return a table of what the filter leaves, by problem type."""
    counts = Counter()  # of (problem type, verdict)
    for record in records:
        verdict = keep(record, rule)
        counts[record["problem_type"], verdict] += 1
        counts["all", verdict] += 1
    kinds = sorted({record["problem_type"] for record in records})
    rows = [("problem type", *VERDICTS)]
    for kind in [*kinds, "all"]:
        cells = [counts[kind, verdict] for verdict in VERDICTS]
        rows.append((kind, *cells))
    return table(rows)


def write_filtered(rule: FilterConfig, samples: list[Sample], records: list[dict]) -> int:
    """Write the questions that `rule` keeps, as data for a config, with absolute media paths; return how many."""
    kept = []
    for sample, record in zip(samples, records):
        if keep(record, rule) == "kept":
            kept.append(_as_data(sample) | {"share_right": share_right(record, rule.threshold)})
    if not kept:
        raise DataError(
            f"filter: no question has a share of right answers between {rule.min_share} and {rule.max_share}; "
            "nothing is left for the next stage"
        )
    Path(rule.output).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(rule.output, "".join(json.dumps(record) + "\n" for record in kept))
    return len(kept)


def _as_data(sample: Sample) -> dict:
    """Return the record of a data file that reads as this sample."""
    record = dict(sample.extra)
    for name in ("id", "problem", "problem_type", "options", "solution", "data_type"):
        record[name] = getattr(sample, name)
    if len(sample.paths) > 1:
        record["path"] = sample.paths
    else:
        record["path"] = next(iter(sample.paths.values()), None)
    return record
