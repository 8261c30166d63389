"""IntentBench, Daily-Omni and WorldSense as their authors publish them: questions, and the columns of their tables.

`read_benchmark` reads a published folder. `columns` turns evaluated records (records.py) into the columns of the
HumanOmniV2 paper's tables and of the official leaderboards; tables.py shows them with the published rows beside. Every
score is an average over questions, so `Avg` is never a mean of columns; a question that could not be scored is left
out and counted.
"""

import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hov2.answers import check_reference
from hov2.data.formats import DataError
from hov2.data.records import check_local, check_values, read_json, read_records
from hov2.data.samples import Sample, read_texts, text_field
from hov2.evaluation.results import mean, some

# By benchmark. "columns" are [breakdown, label, number of questions] by column of the paper's table. "published" are
# sources with their date (null: not known) and rows: accuracies in % of the columns and Avg, printed with "digits", or
# Avg alone. "breakdowns" are [field of a record, labels that come first beside the columns']; "notes" are printed below
# the table; IntentBench's "rules" are {what a question goes by: {its value, in lower case without signs: column}}.
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
NOT_GIVEN = "(not given)"  # the column of questions without the field that a breakdown goes by

Score = tuple[float | None, int]  # the mean, and over how many scored questions


# ---- Reading ----


def read_benchmark(name: str, folder: str | Path) -> list[Sample]:
    """Return the questions of a benchmark, read from its published folder, in the order of its file.

    `name`: "intentbench" (qa.json, videos/), "daily-omni" (qa.json, Videos/ID/ID_video.mp4) or "worldsense"
    (worldsense_qa.json, videos/ID.mp4). `extra` keeps the benchmark's own fields, except for WorldSense's long
    video_caption. Ids are unique: the record's number follows one that is taken. A clip is where the benchmark has it,
    else wherever Clips finds it by its name; one that is nowhere is no error here (`missing_clips`). Raises DataError
    for the first record that can't be used, and for a clip of which there are two.
    """
    if name not in LAYOUTS:
        raise DataError(f"unknown benchmark {name!r}; known: {', '.join(LAYOUTS)}")
    layout = LAYOUTS[name]
    path = Path(folder) / layout.file
    problem_type = None if name == "intentbench" else "multiple choice"  # None: each record says it
    clips = Clips(folder)
    samples = {}
    for where, key, record in _records(name, path):
        for question in layout.questions(record, where, key):
            own_id = question.id
            if own_id in samples:
                own_id = f"{own_id}#{key}"
            clip = clips.find(layout.clip.format(question.clip), question.where)
            samples[own_id] = _sample(question, own_id, problem_type, path, clip)
    return list(samples.values())


@dataclass
class _Question:
    """A question as it is published."""

    where: str  # in what file and record: the beginning of an error
    id: str
    clip: str
    fields: tuple[str, str, str]  # of `record`: the question, its options, its answer
    record: dict


def _read_intentbench(record: dict, where: str, _: int) -> Iterator[_Question]:
    """Yield the one question of a record; its id is the qid, or the file name of the video."""
    clip_field = "path" if record.get("path") and not record.get("video") else "video"
    clip = text_field(record, clip_field, where)
    own_id = clip if record.get("qid") in (None, "") else str(record["qid"])
    answer_field = "solution" if record.get("solution") else "answer"
    yield _Question(where, own_id, clip, ("problem", "options", answer_field), record)


def _read_daily_omni(record: dict, where: str, number: int) -> Iterator[_Question]:
    """Yield the one question of a record."""
    clip = text_field(record, "video_id", where)
    yield _Question(where, f"{clip}::{number}", clip, ("Question", "Choice", "Answer"), record)


def _read_worldsense(record: dict, where: str, clip: str) -> Iterator[_Question]:
    """Yield the questions of a video, its fields task0, task1, ..., each with what is said of the video."""
    tasks = [key for key in record if re.fullmatch(r"task\d+", key)]
    tasks.sort(key=lambda task: int(task.removeprefix("task")))
    if not tasks:
        raise DataError(f"{where}: missing field 'task0'")
    about = {key: value for key, value in record.items() if key not in tasks}
    for task in tasks:
        question = about | _object(record[task], f"{where}: {task}")
        fields = ("question", "candidates", "answer")
        yield _Question(f"{where}: {task}", f"{clip}::{task}", clip, fields, question)


@dataclass(frozen=True)
class Layout:
    """How a benchmark is published."""

    file: str
    kind: type  # of what the file holds: a list of records, or a dict of videos
    questions: Callable[..., Iterator[_Question]]  # from a record, where it is, and its number or video
    clip: str  # where the clip {0} is


LAYOUTS = {
    "intentbench": Layout("qa.json", list, _read_intentbench, "videos/{0}"),
    "daily-omni": Layout("qa.json", list, _read_daily_omni, "Videos/{0}/{0}_video.mp4"),
    "worldsense": Layout("worldsense_qa.json", dict, _read_worldsense, "videos/{0}.mp4"),
}
NO_EXTRA = ("solution", "problem_type", "data_type", "video", "path", "video_caption")


def _records(name: str, path: Path) -> Iterator[tuple[str, int | str, dict]]:
    """Yield (where it is, its number or video, record) of each record in a benchmark's file."""
    kind = LAYOUTS[name].kind
    if not path.is_file():
        raise DataError(f"{path}: can't be read: no such file; {name} is published with that file")
    if kind is list:
        expected = "a list of records"
        content = [(f"record {number}", number, record) for number, record in read_records(path)]
    else:
        expected = "an object of videos"
        videos = read_json(path)
        if not isinstance(videos, dict):
            raise DataError(f"{path}: expected {expected}, got {type(videos).__name__}")
        content = [(f"video {video}", video, record) for video, record in videos.items()]
    if not content:
        raise DataError(f"{path}: expected {expected}, not empty")
    for place, key, record in content:
        if isinstance(record, DataError):
            raise record
        check_values(key, str(path))
        where = f"{path}: {place}"
        check_values(record, where)
        yield where, key, _object(record, where)


def _object(value: object, where: str) -> dict:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, got {type(value).__name__}")
    return value


def _sample(question: _Question, own_id: str, problem_type: str | None, path: Path, clip: str) -> Sample:
    """Return a question as a Sample; DataError if a text of it is at fault. `problem_type` None: its record says it."""
    where = question.where
    fields = question.fields
    problem, options, answer, problem_type = read_texts(question.record, where, fields, problem_type)
    solution = answer if "<answer>" in answer else f"<answer>{answer}</answer>"
    try:
        check_reference(solution, problem_type)
    except ValueError as error:
        raise DataError(f"{where}: {fields[2]}: {error}") from None
    check_local(question.clip, f"{where}: path")
    left_out = (*fields, *NO_EXTRA)
    return Sample(
        id=own_id,
        problem=problem,
        problem_type=problem_type,
        options=options,
        solution=solution,
        data_type="video",
        source=str(path),
        extra={field: value for field, value in question.record.items() if field not in left_out},
        paths={"video": clip},
    )


# ---- Clips ----

DEPTH = 3  # folders down to a clip: videos/, one that an archive brought along, one of the clip's own


class Clips:
    """The files in a benchmark's folder and in the folders below it, listed once, to be found by name."""

    def __init__(self, folder: str | Path):
        self.folder = Path(os.path.abspath(folder))
        self.paths = {}  # {folded name: paths}
        self._list(self.folder, DEPTH)

    def _list(self, folder: Path, depth: int) -> None:
        if not folder.is_dir():
            return
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if not entry.is_dir():
                self.paths.setdefault(_folded(entry.name), []).append(entry.path)
            elif depth > 0:
                self._list(Path(entry.path), depth - 1)

    def find(self, place: str, where: str) -> str:
        """Return the path of a clip that should be at `place`, or of one with its name in another folder.

        Case and Unicode form (NFC, NFD) of the name don't matter, unless there are several: then an exact one is meant.
        Without any it is the path of `place`. Raises DataError, which begins with `where`, if several could be meant.
        """
        path = str(self.folder / place)
        found = self.paths.get(_folded(path), [])
        exact = [candidate for candidate in found if os.path.basename(candidate) == os.path.basename(path)]
        if not found or path in found:
            return path
        candidates = exact or found
        if len(candidates) > 1:
            raise DataError(f"{where}: clip {os.path.basename(path)!r}: {' or '.join(candidates)}? Move one elsewhere")
        return candidates[0]


def _folded(path: str) -> str:
    """Return the file name in a path without differences of case and Unicode form."""
    return unicodedata.normalize("NFC", os.path.basename(path).casefold())


def missing_clips(samples: list[Sample], folder: str | Path) -> str:
    """Return a sentence that names the clips of `samples` that aren't there, and where they were looked for; or ""."""
    paths = dict.fromkeys(sample.paths["video"] for sample in samples)  # each once
    missing = [path for path in paths if not os.path.exists(path)]
    if not missing:
        return ""
    return (
        f"{len(missing)} of {len(paths)} clips are nowhere in {folder}, nor in folders up to {DEPTH} below it: "
        f"{some(os.path.basename(path) for path in missing)}"
    )


# ---- Columns ----


def _plain(value: object) -> str:
    """Return a label without case, spaces and signs, so that "Context Understanding" is "Context understanding"."""
    return re.sub(r"[\W_]+", " ", str(value).replace("&", " and ")).strip().casefold()


def _labels(record: dict, field: str | None, spelled: dict[str, str]) -> list[str]:
    """Return a record's labels by `field`, which may hold a list of several, each once.

    `spelled` maps plain labels to known ones. Without a field, it is the column of IntentBench.
    """
    if field is None:
        return [intent_column(record)[0]]
    values = record["extra"].get(field)
    if not isinstance(values, list):
        values = [values]
    labels = []
    for value in values:
        if value in (None, ""):
            continue
        label = spelled.get(_plain(value), str(value).strip())
        if label not in labels:
            labels.append(label)
    return labels or [NOT_GIVEN]


RULES = tuple(PUBLISHED["intentbench"]["rules"])


def intent_column(record: dict) -> tuple[str, str]:
    """Return (column of the paper's table, which of RULES said so) of an IntentBench question.

    Its `Type` where that names a column; else emer_ov_mc is Emotion and judge is Deception, and any other question goes
    by the first of the question words, in published.json's order, that its letters hold (so "somewhat" is What); Other
    without one. That is how the published questions got their `Type`: all 2,356 multiple-choice ones agree.
    """
    problem = record["problem"].lower()
    question_words = PUBLISHED["intentbench"]["rules"]["question word"]
    said = {
        "Type": [_plain(record["extra"].get("Type"))],
        "problem type": [record["problem_type"]],
        "question word": [word for word in question_words if word in problem],
    }
    for rule, column_of in PUBLISHED["intentbench"]["rules"].items():
        for value in said[rule]:
            if value in column_of:
                return column_of[value], rule
    return "Other", RULES[-1]


def groups(name: str, records: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Return {table: {column: its records}}: first "paper", the paper's columns and `Avg`, then breakdowns.

    Labels that are not known beforehand follow, sorted, then NOT_GIVEN.
    """
    columns_of_paper = PUBLISHED[name]["columns"]
    breakdowns = {title: _breakdown(name, title, records) for title in PUBLISHED[name]["breakdowns"]}
    paper = {column: breakdowns[title][label] for column, (title, label, _) in columns_of_paper.items()}
    paper["Avg"] = list(records)
    return {"paper": paper, **breakdowns}


def _breakdown(name: str, title: str, records: list[dict]) -> dict[str, list[dict]]:
    """Return {label: its records} of one breakdown; the labels that are known, then others, then NOT_GIVEN."""
    field, more = PUBLISHED[name]["breakdowns"][title]
    known = [label for of, label, _ in PUBLISHED[name]["columns"].values() if of == title] + more
    spelled = {_plain(label): label for label in known}
    found = {label: [] for label in known}
    for record in records:
        for label in _labels(record, field, spelled):
            found.setdefault(label, []).append(record)
    others = sorted(found.keys() - {*known, NOT_GIVEN})
    if NOT_GIVEN in found:
        others.append(NOT_GIVEN)
    return {label: found[label] for label in (*known, *others)}


def columns(name: str, records: list[dict]) -> dict[str, dict[str, Score]]:
    """Return {table: {column: (score in [0, 1] or None, number of scored questions)}} of `groups` and "letters".

    A score is the mean accuracy over the questions that have one. "letters": the multiple-choice questions once more,
    with the answer's letter taken by `strict_letter` and by `lenient_letter`.
    """
    tables = {}
    for title, of_table in groups(name, records).items():
        tables[title] = {}
        for column, found in of_table.items():
            tables[title][column] = _score(record["accuracy"] for record in found)
    chosen = []
    for record in records:
        if record["problem_type"] == "multiple choice" and record["accuracy"] is not None:
            chosen.append(record)
    tables["letters"] = {
        "strict": _score(_letter_score(record, strict_letter) for record in chosen),
        "lenient": _score(_letter_score(record, lenient_letter) for record in chosen),
    }
    return tables


def _score(values: Iterable[float | None]) -> Score:
    present = [value for value in values if value is not None]
    return mean(present), len(present)


# ---- Letters ----


def strict_letter(text: str) -> str | None:
    """Return the letter by the rule of Daily-Omni's script of 2025 for Qwen2.5-Omni.

    `text`, after the mark of the last assistant's turn if there is one, has to begin with A, B, C or D in either case
    ("b", "C. words", and also "Anger"); else None.
    """
    reply = re.split(r"(?:^|\n)\s*assistant\s*\n", text)[-1]
    match = re.match(r"\s*([A-D])", reply, re.IGNORECASE)
    return match[1].upper() if match else None


_ANNOUNCED = re.compile(r"(?:The (?:best |correct )?(?:answer|option)(?: is)?|(?:Best )?(?:[Aa]nswer|[Oo]ption):)")


def lenient_letter(text: str) -> str | None:
    """Return the letter by WorldSense's rule.

    The first capital A, B, C or D anywhere, once phrases like "The answer is" are out; None without one (there the
    official protocol asks a language model, this doesn't).
    """
    match = re.search("[ABCD]", _ANNOUNCED.sub("", text))
    return match[0] if match else None


def _letter_score(record: dict, letter_of: Callable[[str], str | None]) -> float:
    """Return 1 if `letter_of` finds the right one in the record's answer, else 0; the mean over several samples."""
    right = check_reference(record["solution"], "multiple choice")
    answers = record.get("samples") or [record]
    hits = 0
    for answer in answers:
        said = answer["completion"] if answer["answer"] is None else answer["answer"]
        hits += {letter_of(said or "")} == right
    return hits / len(answers)
