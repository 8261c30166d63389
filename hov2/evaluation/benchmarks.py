"""IntentBench, Daily-Omni and WorldSense as their authors publish them: questions, columns of a report, published rows.

`read_benchmark` reads a published folder. `columns` turns evaluated records (evaluator.py) into the columns of the
HumanOmniV2 paper's tables and of the official leaderboards, `render` into text, with the published rows beside. Every
score is an average over questions, so `Avg` is never a mean of columns; a question that could not be scored is left
out and counted.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hov2.answers import check_reference
from hov2.data.formats import DataError
from hov2.data.records import check_local, check_values, read_json, read_records
from hov2.data.samples import Sample, read_texts, text_field
from hov2.evaluation.results import mean, table

# By benchmark. "columns" are [breakdown, label, number of questions] by column of the paper's table; "rows" have their
# accuracies in %, Avg last, printed with "digits"; "breakdowns" are [field of a record, labels that come first beside
# the columns']; "note" is printed below the table; IntentBench's "rules" are {what a question goes by: {its value, in
# lower case without signs: column}}.
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
NOT_GIVEN = "(not given)"  # the column of questions without the field that a breakdown goes by

Interval = Callable[[list[float]], Sequence[float]]  # from the accuracies of a column to (low, high) in [0, 1]
Score = tuple[float | None, int]  # the mean, and over how many scored questions


# ---- Reading ----


def read_benchmark(name: str, folder: str | Path) -> list[Sample]:
    """Return the questions of a benchmark, read from its published folder, in the order of its file.

    `name`: "intentbench" (qa.json, videos/), "daily-omni" (qa.json, Videos/ID/ID_video.mp4) or "worldsense"
    (worldsense_qa.json, videos/ID.mp4). `extra` keeps the benchmark's own fields, except for WorldSense's long
    video_caption. Ids are unique: the record's number follows one that is taken. Clips aren't looked into. Raises
    DataError for the first record that can't be used.
    """
    if name not in LAYOUTS:
        raise DataError(f"unknown benchmark {name!r}; known: {', '.join(LAYOUTS)}")
    layout = LAYOUTS[name]
    path = Path(folder) / layout.file
    problem_type = None if name == "intentbench" else "multiple choice"  # None: each record says it
    samples = {}
    for where, key, record in _records(name, path):
        for question in layout.questions(record, where, key):
            own_id = question.id
            if own_id in samples:
                own_id = f"{own_id}#{key}"
            samples[own_id] = _sample(question, own_id, problem_type, path, layout.places)
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
    places: tuple[str, ...]  # where a clip may be; the last one is named if it is nowhere


LAYOUTS = {
    "intentbench": Layout("qa.json", list, _read_intentbench, ("{0}", "videos/{0}")),
    "daily-omni": Layout(
        "qa.json",
        list,
        _read_daily_omni,
        ("videos/{0}/{0}_video.mp4", "{0}/{0}_video.mp4", "Videos/{0}/{0}_video.mp4"),
    ),
    "worldsense": Layout("worldsense_qa.json", dict, _read_worldsense, ("{0}.mp4", "videos/{0}.mp4")),
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


def _sample(question: _Question, own_id: str, problem_type: str | None, path: Path, places: tuple[str, ...]) -> Sample:
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
        paths={"video": _find(path.parent, [place.format(question.clip) for place in places])},
    )


def _find(root: Path, names: list[str]) -> str:
    """Return the absolute path of the first of `names` that exists under `root`, of the last if none does."""
    for name in names:
        if (root / name).exists():
            return os.path.abspath(root / name)
    return os.path.abspath(root / names[-1])


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
    """Return the letter by Daily-Omni's rule.

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


# ---- The report ----


def partial(name: str, records: list[dict]) -> str:
    """Return a sentence that says how the number of scored questions differs from the published one; "" if equal."""
    published = PUBLISHED[name]["questions"]
    scored = sum(record["accuracy"] is not None for record in records)
    if scored == published == len(records):
        return ""
    text = f"{PUBLISHED[name]['name']} has {published:,} published questions; this score is over {scored:,}"
    if scored < len(records):
        text += f", {len(records) - scored:,} more have none"
    return text


def render(name: str, records: list[dict], interval: Interval | None = None) -> str:
    """Return a text table: our scores in %, the numbers of questions, the published rows, then the other breakdowns.

    `interval`: from the accuracies of a column to (low, high) in [0, 1]; shown with each score.
    """
    about = PUBLISHED[name]
    found = groups(name, records)
    warning = partial(name, records)
    lines = []
    if warning:
        lines.append(f"WARNING: {warning}: the score is partial.")
    lines.append(f"{about['name']}, accuracy in %, Avg over questions")
    lines.append(_paper_table(about, found["paper"], bool(warning), interval))
    lines.append(about["note"])
    if name == "intentbench":
        rules = [intent_column(record)[1] for record in records]
        counts = [f"{rule} ({rules.count(rule)} questions)" for rule in RULES]
        lines.append(f"Columns by: {', '.join(counts)}")
    for title in about["breakdowns"]:
        in_paper = {label for of, label, _ in about["columns"].values() if of == title}
        if not found[title].keys() <= in_paper:
            lines += ["", _breakdown_table(title, found[title], interval)]
    letters = columns(name, records)["letters"]
    strict, count = letters["strict"]
    lenient, _ = letters["lenient"]
    lines.append("")
    lines.append(
        f"letter taken by the official rules, {count} multiple choice questions: "
        f"strict (Daily-Omni's) {_percent(strict)}, lenient (WorldSense's) {_percent(lenient)}"
    )
    return "\n".join(lines)


def _paper_table(about: dict, found: dict[str, list[dict]], is_partial: bool, interval: Interval | None) -> str:
    """Return the paper's table: this run's rows, a line, the published rows."""
    counts = [count for _, _, count in about["columns"].values()] + [about["questions"]]
    rows = [
        ("", *found),
        ("questions, published", *["-" if count is None else count for count in counts]),
    ]
    titles = ["questions", "this run (partial)" if is_partial else "this run"]
    if interval:
        titles += ["  95 % from", "  95 % to"]
    cells = [_cells(of_column, interval) for of_column in found.values()]
    for position, title in enumerate(titles):
        rows.append((title, *[of_column[position] for of_column in cells]))
    num_ours = len(rows)
    for title, accuracies in about["rows"].items():
        rows.append((title, *[_percent(accuracy, 1, about["digits"]) for accuracy in accuracies]))
    lines = table(rows).splitlines()
    lines.insert(num_ours, "-" * len(lines[0]))
    return "\n".join(lines)


def _breakdown_table(title: str, found: dict[str, list[dict]], interval: Interval | None) -> str:
    """Return the table of one breakdown, a row a label."""
    header = [f"by {title}", "questions", "accuracy"]
    if interval:
        header += ["95 % from", "to"]
    rows = [header]
    for label, of_label in found.items():
        rows.append([label, *_cells(of_label, interval)])
    return table(rows)


def _cells(records: list[dict], interval: Interval | None) -> list:
    """Return how many of the questions have a score, their accuracy in %, and its bounds if `interval` is given."""
    values = [record["accuracy"] for record in records if record["accuracy"] is not None]
    cells = [len(values), _percent(mean(values))]
    if interval:
        low, high = interval(values) if values else (None, None)
        cells += [_percent(low), _percent(high)]
    return cells


def _percent(value: float | None, factor: float = 100, digits: int = 2) -> str:
    return "-" if value is None else f"{factor * value:.{digits}f}"
