"""Questions by their ids: lists of questions to keep or to leave out, and answers that another program wrote."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hov2.data.formats import DataError
from hov2.data.records import read_records
from hov2.data.samples import Sample
from hov2.evaluation.records import Completion
from hov2.evaluation.results import some

# ---- Lists ----


def listed(ids: Iterable[str], only: str | None, exclude: str | None) -> set[str]:
    """Return those of `ids` that are in the file `only`, if there is one, and not in the file `exclude`.

    Raises DataError for a file that can't be read, for ids in it that are none of `ids`, and if nothing is left.
    """
    known = set(ids)
    left = set(known)
    if only:
        left &= _read_list("only", only, known)
    if exclude:
        left -= _read_list("exclude", exclude, known)
    if not left:
        raise DataError(f"only {only!r} and exclude {exclude!r} leave none of {len(known)} questions")
    return left


def _read_list(key: str, path: str, known: set[str]) -> set[str]:
    """Return the ids in a file: a JSON list, or one a line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
        lines = json.loads(text) if text.startswith("[") else text.splitlines()
    except (OSError, ValueError) as error:  # JSON's and UTF-8's errors are ValueErrors
        raise DataError(f"{key}: {path}: expected ids, one a line or as a JSON list: {error}") from None
    ids = [str(line).strip() for line in lines if str(line).strip()]
    unknown = [name for name in ids if name not in known]
    if unknown:
        raise DataError(
            f"{key}: {path}: {len(unknown)} of its {len(ids)} ids are those of no question: {some(unknown)}; "
            f"ids here look like {min(known)!r}"
        )
    return set(ids)


# ---- Answers ----


@dataclass
class Given:
    """What a file of answers says of a question: its completions, or why there is none."""

    completions: list[Completion] = field(default_factory=list)
    error: str | None = None


def read_answers(path: str) -> dict[str, Given]:
    """Return {id: Given} of a file of answers, one object a line (.jsonl) or a list (.json).

    An object has `id` and `text`; `completion` will do as well, `truncated` may say that it was cut off. Several
    answers are a list of such objects under `samples`; with an `error` there is none. hov2's own predictions.jsonl is
    such a file. Raises DataError for a line that isn't one, and for ids that come twice.
    """
    given = {}
    counts = Counter()
    for number, record in read_records(path):
        if isinstance(record, DataError):
            raise record
        where = f"{path}: record {number}"
        name = record.get("id") if isinstance(record, dict) else None
        if not isinstance(name, str | int) or name == "":
            raise DataError(f"{where}: expected an object with an id and a text, got {record!r:.80}")
        counts[str(name)] += 1
        given[str(name)] = _given(record, where)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise DataError(
            f"{path}: {len(twice)} ids come more than once: {some(twice)}. Of each question there is one line; several "
            "answers to it go into a list, `samples`"
        )
    return given


def _given(record: dict, where: str) -> Given:
    if record.get("error"):
        return Given(error=str(record["error"]))
    answers = record.get("samples", [record])
    if not isinstance(answers, list) or not answers:
        raise DataError(f"{where}: samples: expected a list of objects with a text, got {answers!r:.80}")
    return Given([_completion(answer, where) for answer in answers])


def _completion(answer: Any, where: str) -> Completion:
    text = None
    if isinstance(answer, dict):
        text = answer.get("text", answer.get("completion"))
    if not isinstance(text, str):
        raise DataError(f"{where}: text: expected text, got {text!r:.80}; leave the line out if there is no answer")
    return Completion(text, answer.get("truncated"))


# ---- What a score is over ----


@dataclass(frozen=True)
class Coverage:
    """Which of the questions that were read a score is over."""

    ids: list[str]  # of all questions that were read
    left_out: int = 0  # by the lists
    missing: Sequence[str] = ()  # ids of questions that a file of answers has none to
    unknown: Sequence[str] = ()  # ids in a file of answers that are those of no question

    def text(self) -> str:
        """Return in words what the score is over, if not over all questions, and what a file of answers has beyond."""
        lines = []
        if self.left_out or self.missing:
            asked = len(self.ids) - self.left_out - len(self.missing)
            lines.append(f"over {asked:,} of {len(self.ids):,} questions:")
        if self.left_out:
            lines.append(f"  {self.left_out:,} left out by the lists `only` and `exclude`")
        if self.missing:
            lines.append(f"  {len(self.missing):,} without an answer, which are not scored as 0: {some(self.missing)}")
        if self.unknown:
            lines.append(f"WARNING: {len(self.unknown):,} answers are to no question here: {some(self.unknown)}")
        return "\n".join(lines)


def select(samples: list[Sample], only: str | None, exclude: str | None) -> tuple[list[Sample], Coverage]:
    """Return the samples that the lists leave, as for `listed`, and what a score of them is over."""
    ids = [sample.id for sample in samples]
    left = listed(ids, only, exclude)
    selected = [sample for sample in samples if sample.id in left]
    return selected, Coverage(ids, len(samples) - len(selected))


def answered(samples: list[Sample], given: dict[str, Given], coverage: Coverage) -> tuple[list[Sample], Coverage]:
    """Return the samples that have an answer, in their order, and what a score of them is over.

    `samples` and `coverage` are what `select` gives. Raises DataError if questions share an id, and if no answer is to
    one of them.
    """
    counts = Counter(sample.id for sample in samples)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise DataError(
            f"{len(twice)} ids are those of several questions, so that answers can't be told apart: {some(twice)}"
        )
    found = [sample for sample in samples if sample.id in given]
    if not found:
        raise DataError(
            f"none of the {len(given)} answers is to one of the {len(samples)} questions: their ids are like "
            f"{min(given, default=None)!r}, those of the questions like {min(counts)!r}"
        )
    missing = [sample.id for sample in samples if sample.id not in given]
    everything = set(coverage.ids)
    unknown = [name for name in given if name not in everything]
    return found, replace(coverage, missing=missing, unknown=unknown)
