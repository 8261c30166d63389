"""IntentBench, Daily-Omni and WorldSense as their authors publish them: questions, columns of a report, published rows.

`read_benchmark` reads a published folder. `columns` turns evaluated records (evaluation.py) into the columns of the
HumanOmniV2 paper's tables and of the official leaderboards, `render` into text, with the published rows beside. Every
score is an average over questions, so `Avg` is never a mean of columns; a question that could not be scored is left
out and counted.
"""

import json
import os
import re
import string
from pathlib import Path

from hov2.answers import check_reference
from hov2.data.formats import DataError
from hov2.data.samples import Sample, read_texts, text_field
from hov2.evaluation.results import mean, table
from hov2.prompts import CHOICE_TYPES

# By benchmark. "columns" are [breakdown, label, number of questions] by column of the paper's table; "rows" have their
# accuracies in %, Avg last, printed with "digits"; "breakdowns" are [field of a record, labels that come first beside
# the columns']; "note" is printed below the table; IntentBench's "rules" are {what a question goes by: {its value, in
# lower case without signs: column}}.
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
NOT_GIVEN = "(not given)"  # the column of questions without the field that a breakdown goes by


# ---- Reading ----


def read_benchmark(name, folder):
    """The questions of a benchmark as Samples, read from its published folder, in the order of its file.

    `name`: "intentbench" (qa.json, videos/), "daily-omni" (qa.json, Videos/ID/ID_video.mp4) or "worldsense"
    (worldsense_qa.json, videos/ID.mp4). `extra` keeps the benchmark's own fields, except for WorldSense's long
    video_caption. Ids are unique: the record's number follows one that is taken. Clips aren't looked into. Raises
    DataError for the first record that can't be used.
    """
    if name not in READERS:
        raise DataError(f"unknown benchmark {name!r}; known: {', '.join(READERS)}")
    file_name, kind, read, places = READERS[name]
    path = Path(folder) / file_name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON or not UTF-8
        raise DataError(f"{path}: not valid JSON: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}; {name} is published with that file") from None
    if not isinstance(content, kind) or not content:
        raise DataError(f"{path}: expected {'a list of records' if kind is list else 'an object of videos'}, not empty")
    samples = {}
    for key, entry in content.items() if kind is dict else enumerate(content, 1):
        where = f"{path}: {'video' if kind is dict else 'record'} {key}"
        for at, own_id, video, fields, item in read(_object(entry, where), where, key):
            own_id = f"{own_id}#{key}" if own_id in samples else own_id
            texts = _texts(item, at, fields, problem_type=None if name == "intentbench" else "multiple choice")
            extra = {field: value for field, value in item.items() if field not in (*fields, *NO_EXTRA)}
            samples[own_id] = Sample(own_id, *texts, data_type="video", source=str(path), extra=extra,
                                     paths={"video": _find(path.parent, [place.format(video) for place in places])})
    return list(samples.values())


def _read_intentbench(item, where, _):
    """The id is the qid, or the file name of the video."""
    video = text_field(item, "path" if item.get("path") and not item.get("video") else "video", where)
    own_id = video if item.get("qid") in (None, "") else str(item["qid"])
    yield where, own_id, video, ("problem", "options", "solution" if item.get("solution") else "answer"), item


def _read_daily_omni(item, where, number):
    video = text_field(item, "video_id", where)
    yield where, f"{video}::{number}", video, ("Question", "Choice", "Answer"), item


def _read_worldsense(item, where, video):
    tasks = sorted((key for key in item if re.fullmatch(r"task\d+", key)), key=lambda key: int(key[4:]))
    if not tasks:
        raise DataError(f"{where}: missing field 'task0'")
    about = {key: value for key, value in item.items() if key not in tasks}
    for task in tasks:
        question = about | _object(item[task], f"{where}: {task}")
        yield f"{where}: {task}", f"{video}::{task}", video, ("question", "candidates", "answer"), question


# Benchmark: file, what it holds, places of a clip (the last one if it is nowhere), and what reads a record or a video:
# (where, id, clip, names of the question, its options and its answer, item) of each question in it.
READERS = {
    "intentbench": ("qa.json", list, _read_intentbench, ("{0}", "videos/{0}")),
    "daily-omni": ("qa.json", list, _read_daily_omni,
                   ("videos/{0}/{0}_video.mp4", "{0}/{0}_video.mp4", "Videos/{0}/{0}_video.mp4")),
    "worldsense": ("worldsense_qa.json", dict, _read_worldsense, ("{0}.mp4", "videos/{0}.mp4")),
}
NO_EXTRA = ("solution", "problem_type", "data_type", "video", "path", "video_caption")


def _object(value, where):
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, got {type(value).__name__}")
    return value


def _texts(item, where, fields, problem_type):
    """(problem, problem type, options with letters or None, solution) of a question; DataError if one is at fault."""
    problem, options, answer, problem_type = read_texts(item, where, fields, problem_type)
    solution = answer if "<answer>" in answer else f"<answer>{answer}</answer>"
    try:
        right = check_reference(solution, problem_type)
    except ValueError as error:
        raise DataError(f"{where}: {fields[2]}: {error}") from None
    if problem_type in CHOICE_TYPES:
        options = tuple(_labelled(option, letter) for option, letter in zip(options or (), string.ascii_uppercase))
        if not right <= set(string.ascii_uppercase[:len(options)]):
            raise DataError(f"{where}: {fields[2]}: {answer!r} is none of the {len(options)} in {fields[1]!r}")
    return problem, problem_type, options or None, solution


def _labelled(option, letter):
    """The option with its letter before it: "B. joke"; as it is if it has one ("B.joke", "(B) joke")."""
    return option if re.match(rf"\s*\(?{letter}\s*[.:)]", option) else f"{letter}. {option}"


def _find(root, names):
    """The absolute path of the first of `names` that exists under `root`, of the last if none does."""
    return os.path.abspath(root / next((name for name in names if (root / name).exists()), names[-1]))


# ---- Columns ----


def _plain(value):
    """A label without case, spaces and signs, so that "Context Understanding" is "Context understanding"."""
    return re.sub(r"[\W_]+", " ", str(value).replace("&", " and ")).strip().casefold()


def _labels(record, field, spelled):
    """A record's labels by `field`, which may hold a list of several; `spelled` maps plain ones to known ones."""
    if field is None:
        return [intent_column(record)[0]]
    value = record["extra"].get(field)
    values = [v for v in (value if isinstance(value, list) else [value]) if v not in (None, "")]
    return list(dict.fromkeys(spelled.get(_plain(v), str(v).strip()) for v in values)) or [NOT_GIVEN]


RULES = tuple(PUBLISHED["intentbench"]["rules"])


def intent_column(record):
    """(column of the paper's table, which of RULES said so) of an IntentBench question.

    Its `Type` where that names a column; else emer_ov_mc is Emotion and judge is Deception, and any other question goes
    by the first interrogative word in it, Other without one.
    """
    tables, words = PUBLISHED["intentbench"]["rules"], re.findall(r"[a-z]+", record["problem"].lower())
    keys = ([_plain(record["extra"].get("Type"))], [record["problem_type"]], words)
    found = ((tables[rule][key], rule) for rule, of_rule in zip(RULES, keys) for key in of_rule if key in tables[rule])
    return next(found, ("Other", RULES[-1]))


def groups(name, records):
    """{table: {column: its records}}: first "paper", the columns of the paper's table and `Avg`, then each breakdown.

    Labels that are not known beforehand follow, sorted, then NOT_GIVEN.
    """
    tables, of_paper = {}, PUBLISHED[name]["columns"]
    for title, (field, more) in PUBLISHED[name]["breakdowns"].items():
        known, found = [label for of, label, _ in of_paper.values() if of == title] + more, {}
        spelled = {_plain(label): label for label in known}
        for record in records:
            for label in _labels(record, field, spelled):
                found.setdefault(label, []).append(record)
        others = sorted(found.keys() - set(known), key=lambda label: (label == NOT_GIVEN, label))
        tables[title] = {label: found.get(label, []) for label in (*known, *others)}
    paper = {column: tables[title][label] for column, (title, label, _) in of_paper.items()}
    return {"paper": paper | {"Avg": list(records)}, **tables}


def columns(name, records):
    """{table: {column: (score in [0, 1] or None, number of scored questions)}}, the tables of `groups` and "letters".

    A score is the mean accuracy over the questions that have one. "letters": the multiple-choice questions once more,
    with the answer's letter taken by `strict_letter` and by `lenient_letter`.
    """
    tables = {title: {column: _score([r["accuracy"] for r in found]) for column, found in of_table.items()}
              for title, of_table in groups(name, records).items()}
    chosen = [r for r in records if r["problem_type"] == "multiple choice" and r["accuracy"] is not None]
    return tables | {"letters": {rule: _score([_letter_score(r, letter) for r in chosen])
                                 for rule, letter in (("strict", strict_letter), ("lenient", lenient_letter))}}


def _score(values):
    return mean(values), sum(value is not None for value in values)


# ---- Letters ----


def strict_letter(text):
    """The letter by Daily-Omni's rule: `text`, after the mark of the last assistant's turn if there is one, has to
    begin with A, B, C or D in either case ("b", "C. words", and also "Anger"); else None."""
    reply = re.split(r"(?:^|\n)\s*assistant\s*\n", text)[-1]
    match = re.match(r"\s*([A-D])", reply, re.IGNORECASE)
    return match[1].upper() if match else None


_ANNOUNCED = re.compile(r"(?:The (?:best |correct )?(?:answer|option)(?: is)?|(?:Best )?(?:[Aa]nswer|[Oo]ption):)")


def lenient_letter(text):
    """The letter by WorldSense's rule: the first capital A, B, C or D anywhere, once phrases like "The answer is" are
    out; None without one (there the official protocol asks a language model, this doesn't)."""
    match = re.search("[ABCD]", _ANNOUNCED.sub("", text))
    return match[0] if match else None


def _letter_score(record, letter):
    """1 if `letter` finds the right one in the record's answer, else 0; the mean over its samples if it has several."""
    right, answers = check_reference(record["solution"], "multiple choice"), record.get("samples") or [record]
    said = [a["answer"] if a["answer"] is not None else a["completion"] for a in answers]
    return sum({letter(text or "")} == right for text in said) / len(said)


# ---- The report ----


def partial(name, records):
    """A sentence that says how the number of scored questions differs from the published one; "" if it doesn't."""
    scored, published = sum(r["accuracy"] is not None for r in records), PUBLISHED[name]["questions"]
    if scored == published == len(records):
        return ""
    return (f"{PUBLISHED[name]['name']} has {published:,} published questions; this score is over {scored:,}"
            + (f", {len(records) - scored:,} more have none" if scored < len(records) else ""))


def render(name, records, interval=None):
    """A text table: our scores in %, the numbers of questions, the published rows, then the other breakdowns.

    `interval`: from the accuracies of a column to (low, high) in [0, 1]; shown with each score.
    """
    found, warning, about = groups(name, records), partial(name, records), PUBLISHED[name]
    counts = [*(count for *_, count in about["columns"].values()), about["questions"]]
    names = ("questions", "this run (partial)" if warning else "this run", "  95 % from", "  95 % to")
    cells = zip(*(_cells(of_column, interval) for of_column in found["paper"].values()))
    ours = [("", *found["paper"]), ("questions, published", *("-" if count is None else count for count in counts)),
            *((row, *values) for row, values in zip(names, cells))]
    published = [(row, *(_percent(value, 1, about["digits"]) for value in values))
                 for row, values in about["rows"].items()]
    paper = table(ours + published).splitlines()
    paper.insert(len(ours), "-" * len(paper[0]))
    lines = [f"WARNING: {warning}: the score is partial."] if warning else []
    lines += [f"{about['name']}, accuracy in %, Avg over questions", *paper, about["note"]]
    if name == "intentbench":
        rules = [intent_column(record)[1] for record in records]
        lines.append("Columns by: " + ", ".join(f"{rule} ({rules.count(rule)} questions)" for rule in RULES))
    for title in about["breakdowns"]:
        if {(title, label) for label in found[title]} <= {(of, label) for of, label, _ in about["columns"].values()}:
            continue  # the paper's table has it all
        header = (f"by {title}", "questions", "accuracy", *(("95 % from", "to") if interval else ()))
        rows = [(label, *_cells(of_label, interval)) for label, of_label in found[title].items()]
        lines += ["", table([header, *rows])]
    strict, lenient = columns(name, records)["letters"].values()
    lines.append(f"\nletter taken by the official rules, {strict[1]} multiple choice questions: "
                 f"strict (Daily-Omni's) {_percent(strict[0])}, lenient (WorldSense's) {_percent(lenient[0])}")
    return "\n".join(lines)


def _cells(records, interval):
    """How many of the questions have a score, their accuracy in %, and its bounds if `interval` is asked."""
    values = [r["accuracy"] for r in records if r["accuracy"] is not None]
    bounds = (interval(values) if values else (None, None)) if interval else ()
    return [len(values), *map(_percent, (mean(values), *bounds))]


def _percent(value, factor=100, digits=2):
    return "-" if value is None else f"{factor * value:.{digits}f}"
