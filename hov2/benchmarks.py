"""IntentBench, Daily-Omni and WorldSense as their authors publish them: questions, columns of a report, published rows.

`read_benchmark` reads a published folder. `columns` turns evaluated records (evaluation.py) into the columns of the
HumanOmniV2 paper's tables and of the official leaderboards, `render` into text, with the published rows beside. Every
score is an average over questions, so `Avg` is never a mean of columns; a question that could not be scored is left
out and counted.
"""

import json
import math
import os
import re
import string
from pathlib import Path

from hov2.data import CHOICE_TYPES, SPECIAL_TOKEN, DataError, Sample
from hov2.rewards import PROBLEM_TYPES, check_reference

NAMES = {"intentbench": "IntentBench", "daily-omni": "Daily-Omni", "worldsense": "WorldSense"}
NOT_GIVEN = "(not given)"  # the column of questions without the field that a breakdown goes by

# ---- What was published ----

QUESTIONS = {  # by column of the paper's tables; WorldSense says how many in all only
    "intentbench": {"Why": 698, "How": 632, "What": 480, "When": 14, "Who/Which": 25, "Other": 507, "Emotion": 133,
                    "Deception": 200, "Avg": 2689},  # the columns' are recovered from the published scores
    "daily-omni": {"AV-align": 238, "Comp": 131, "Ctx": 193, "EvSeq": 306, "Inf": 154, "Reas": 175, "30s": 647,
                   "60s": 550, "Avg": 1197},
    "worldsense": {"Avg": 3172},
}
PAPER = {  # column of the paper's table: (breakdown, value); `Avg` follows
    "intentbench": {column: ("question", column) for column in list(QUESTIONS["intentbench"])[:-1]},
    "daily-omni": {
        "AV-align": ("type", "AV Event Alignment"), "Comp": ("type", "Comparative"),
        "Ctx": ("type", "Context understanding"), "EvSeq": ("type", "Event Sequence"), "Inf": ("type", "Inference"),
        "Reas": ("type", "Reasoning"), "30s": ("duration", "30s"), "60s": ("duration", "60s"),
    },
    "worldsense": {
        "Tech": ("domain", "Tech & Science"), "Cult": ("domain", "Culture & Politics"),
        "Daily": ("domain", "Daily Life"), "Film": ("domain", "Film & TV"), "Perf": ("domain", "Performance"),
        "Games": ("domain", "Games"), "Sports": ("domain", "Sports"), "Music": ("domain", "Music"),
    },
}
PUBLISHED = {  # the rows of the HumanOmniV2 paper, in %, as printed; None: not published
    "intentbench": {
        "GPT-4o (transcript)": (61.46, 55.69, 60.00, 35.71, 76.00, 63.31, 60.99, 59.00, 59.98),
        "GPT-o1 (transcript)": (68.19, 65.82, 66.04, 57.14, 76.00, 68.83, 67.26, 59.50, 66.69),
        "Gemini-2.5-Pro": (68.57, 67.41, 65.12, 57.14, 64.00, 70.03, 68.23, 60.00, 67.15),
        "MiniCPM-o 8B": (57.87, 53.48, 57.14, 57.14, 68.00, 61.14, 23.85, 49.50, 54.51),  # by its columns: 55.11
        "VITA-1.5 7B": (53.15, 49.36, 51.66, 71.42, 64.00, 61.14, 53.20, 59.50, 54.17),
        "Ola 7B": (60.60, 55.37, 56.87, 64.28, 76.00, 62.91, 46.66, 44.50, 57.41),
        "Qwen2.5-Omni 7B": (62.60, 63.44, 63.53, 57.14, 76.00, 69.03, 59.74, 63.50, 64.20),
        "HumanOmniV2": (66.76, 67.08, 71.25, 50.00, 84.00, 72.39, 82.41, 64.00, 69.33),
        "  SFT only": (58.30, 60.28, 62.91, 64.28, 76.00, 65.28, 79.00, 57.00, 62.03),
        "  w/o judged rewards": (67.47, 65.98, 68.54, 50.00, 76.00, 71.20, 84.00, 62.00, 68.44),
        "  w/o context, judged rewards": (64.47, 64.08, 66.45, 50.00, 80.00, 71.40, 81.37, 61.50, 66.72),
    },
    # Copy errors of the paper, columns 30s and 60s: it swaps the two Qwen2.5-Omni rows (the official leaderboard has
    # 46.68 48.36 for 7B, 42.35 38.36 for 3B), and gives Gemini 2.0 Flash other numbers than the leaderboard (67.23
    # 68.55) and Flash Lite too (62.44 60.00). The leaderboard's fit their Avg, the paper's don't.
    "daily-omni": {
        "Gemini 2.0 Flash": (62.18, 73.28, 63.73, 63.72, 76.62, 75.43, 62.29, 56.57, 67.84),
        "Gemini 2.0 Flash Lite": (55.04, 64.89, 58.03, 54.25, 74.03, 72.00, 60.57, 53.01, 61.32),
        "Unified-IO-2 8B": (25.63, 31.30, 26.42, 25.82, 35.06, 29.71, 26.74, 30.00, 28.24),
        "VideoLLaMA2 7B": (35.71, 35.88, 35.75, 31.70, 40.91, 34.29, 38.02, 31.82, 35.17),
        "Qwen2.5-Omni 3B": (38.66, 48.09, 33.68, 33.99, 54.55, 44.00, 46.68, 48.36, 40.52),
        "Qwen2.5-Omni 7B": (44.12, 51.15, 38.86, 40.52, 57.79, 61.71, 42.35, 38.36, 47.45),
        "Ola 7B": (40.33, 60.30, 39.89, 44.11, 61.03, 66.28, 50.85, 48.72, 49.87),
        "MiniCPM-o 7B": (40.33, 61.06, 49.22, 48.36, 68.83, 61.14, 54.09, 52.00, 53.13),
        "HumanOmniV2": (46.63, 67.93, 51.81, 51.63, 72.72, 74.28, 63.06, 53.09, 58.47),
        "GPT-4o, no sound (official)": (*[None] * 8, 56.47),
        "Daily-Omni agent (official)": (*[None] * 8, 61.82),
    },
    "worldsense": {
        "Claude 3.5 Sonnet": (43.7, 31.7, 30.6, 36.5, 30.7, 31.9, 36.6, 33.9, 34.8),
        "GPT-4o": (48.0, 44.0, 38.3, 43.5, 41.9, 41.2, 42.6, 42.7, 42.6),
        "Gemini 1.5 Pro": (53.7, 47.2, 50.3, 50.4, 52.4, 46.8, 40.2, 42.0, 48.0),
        "Unified-IO-2 XXL": (27.1, 31.7, 23.9, 23.7, 25.5, 23.7, 25.7, 27.3, 25.9),
        "VideoLLaMA2": (29.4, 25.4, 21.8, 24.5, 26.2, 24.6, 25.5, 27.1, 25.4),
        "VITA-1.5": (38.2, 35.9, 34.3, 39.8, 41.2, 32.6, 34.7, 39.9, 36.9),
        "Qwen2.5-Omni 7B": (47.8, 49.8, 43.6, 43.8, 48.3, 39.1, 43.5, 47.3, 45.4),
        "HumanOmniV2": (50.2, 51.7, 47.6, 44.8, 47.3, 44.3, 45.2, 44.2, 47.1),
    },
}
NOTES = {
    "intentbench": "The published row of MiniCPM-o doesn't fit its Avg: by its columns it is 55.11.",
    "daily-omni": "The paper copied 30s and 60s wrongly: officially Qwen2.5-Omni 7B has 46.68 and 48.36, 3B 42.35 and "
                  "38.36,\nGemini 2.0 Flash 67.23 and 68.55, Flash Lite 62.44 and 60.00.",
    "worldsense": "Published numbers mix protocols: Qwen2.5-Omni's 45.4 is of its own code, VLMEvalKit gives about 38.",
}


# ---- Reading ----


def read_benchmark(name, folder):
    """The questions of a benchmark as Samples, read from its published folder, in the order of its file.

    `name`: "intentbench" (qa.json, videos/), "daily-omni" (qa.json, Videos/ID/ID_video.mp4) or "worldsense"
    (worldsense_qa.json, videos/ID.mp4). `extra` keeps the benchmark's own fields, except for WorldSense's long
    video_caption. Ids are unique. Clips aren't looked into. Raises DataError for the first record that can't be used.
    """
    if name not in READERS:
        raise DataError(f"unknown benchmark {name!r}; known: {', '.join(READERS)}")
    file_name, kind, read = READERS[name]
    path = Path(folder) / file_name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON or not UTF-8
        raise DataError(f"{path}: not valid JSON: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}; {NAMES[name]} is published with that file") from None
    if not isinstance(content, kind) or not content:
        raise DataError(f"{path}: expected {'a list of records' if kind is list else 'an object of videos'}, not empty")
    return list(read(content, path))


def _read_intentbench(items, path):
    """Ids are the qid, or the file name of the video, with the record's number where that is taken."""
    taken = set()
    for number, item in enumerate(items, 1):
        where = _object(item, f"{path}: record {number}")
        video = _text(item, "path" if item.get("path") and not item.get("video") else "video", where)
        name = video if item.get("qid") in (None, "") else str(item["qid"])
        name = f"{name}#{number}" if name in taken else name
        taken.add(name)
        fields = ("problem", "options", "solution" if item.get("solution") else "answer")
        extra = _without(item, *fields[:2], "solution", "problem_type", "data_type", "video", "path")
        yield _sample(item, where, path, name, fields, _find(path.parent, video, f"videos/{video}"), extra,
                      _text(item, "problem_type", where))


def _read_daily_omni(items, path):
    fields = ("Question", "Choice", "Answer")
    for number, item in enumerate(items, 1):
        where = _object(item, f"{path}: record {number}")
        video = _text(item, "video_id", where)
        file = _find(path.parent, *(f"{folder}{video}/{video}_video.mp4" for folder in ("videos/", "", "Videos/")))
        yield _sample(item, where, path, f"{video}::{number}", fields, file, _without(item, *fields))


def _read_worldsense(videos, path):
    fields = ("question", "candidates", "answer")
    for video, item in videos.items():
        where = _object(item, f"{path}: video {video}")
        tasks = sorted((key for key in item if re.fullmatch(r"task\d+", key)), key=lambda key: int(key[4:]))
        if not tasks:
            raise DataError(f"{where}: missing field 'task0'")
        file, about = _find(path.parent, f"{video}.mp4", f"videos/{video}.mp4"), _without(item, *tasks, "video_caption")
        for task in tasks:
            where = _object(item[task], f"{path}: video {video}: {task}")
            extra = about | _without(item[task], *fields)
            yield _sample(item[task], where, path, f"{video}::{task}", fields, file, extra)


READERS = {  # benchmark: file, what it holds, reader
    "intentbench": ("qa.json", list, _read_intentbench),
    "daily-omni": ("qa.json", list, _read_daily_omni),
    "worldsense": ("worldsense_qa.json", dict, _read_worldsense),
}


def _object(value, where):
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, got {type(value).__name__}")
    return where


def _text(item, field, where):
    if field not in item:
        raise DataError(f"{where}: missing field {field!r}")
    if not isinstance(item[field], str) or not item[field].strip():
        raise DataError(f"{where}: {field}: expected text, got {item[field]!r}")
    return item[field]


def _without(item, *fields):
    return {key: value for key, value in item.items() if key not in fields}


def _sample(item, where, path, name, fields, video, extra, problem_type="multiple choice"):
    """A Sample; `fields` are the item's names for the question, its options and its answer. DataError if it has none.
    """
    problem, options, answer = _text(item, fields[0], where), item.get(fields[1]), _text(item, fields[2], where)
    if problem_type not in PROBLEM_TYPES:
        raise DataError(f"{where}: problem_type: unknown {problem_type!r}; known: {', '.join(PROBLEM_TYPES)}")
    if not isinstance(options or [], list) or not all(isinstance(o, str) and o.strip() for o in options or ()):
        raise DataError(f"{where}: {fields[1]}: expected a list of texts, got {options!r}")
    solution = answer if "<answer>" in answer else f"<answer>{answer}</answer>"
    try:
        right = check_reference(solution, problem_type)
    except ValueError as error:
        raise DataError(f"{where}: {fields[2]}: {error}") from None
    if problem_type in CHOICE_TYPES:
        options = [_labelled(option, letter) for option, letter in zip(options or (), string.ascii_uppercase)]
        if not right <= set(string.ascii_uppercase[:len(options)]):
            raise DataError(f"{where}: {fields[2]}: {answer!r} is none of the {len(options)} in {fields[1]!r}")
    for field, text in ((fields[0], problem), (fields[1], "\n".join(options or ())), (fields[2], answer)):
        if special := SPECIAL_TOKEN.search(text):
            raise DataError(f"{where}: {field}: {special[0]} has the form of a special token, no part of a text")
    return Sample(id=name, problem=problem, problem_type=problem_type, options=tuple(options) if options else None,
                  solution=solution, data_type="video", paths={"video": video}, source=str(path), extra=extra)


def _labelled(option, letter):
    """The option with its letter before it: "B. joke"; as it is if it has one ("B.joke", "(B) joke")."""
    return option if re.match(rf"\s*\(?{letter}\s*[.:)]", option) else f"{letter}. {option}"


def _find(root, *names):
    """The absolute path of the first of `names` that exists under `root`, of the last if none does."""
    found = next((name for name in names if (root / name).exists()), names[-1])
    return os.path.abspath(root / found)


# ---- Columns ----


def _plain(value):
    """A label without case, spaces and signs, so that "Context Understanding" is "Context understanding"."""
    return re.sub(r"[\W_]+", " ", str(value).replace("&", " and ")).strip().casefold()


def _by_field(field, *known):
    """(record -> its labels in `field`, which may be a list of several; the labels that are known)."""
    spelled = {_plain(label): label for label in known}

    def labels(record):
        value = record["extra"].get(field)
        values = [v for v in (value if isinstance(value, list) else [value]) if v not in (None, "")]
        return list(dict.fromkeys(spelled.get(_plain(v), str(v).strip()) for v in values)) or [NOT_GIVEN]

    return labels, known


_INTENT_COLUMNS = {_plain(column): column for column in PAPER["intentbench"]}
_INTENT_COLUMNS |= dict.fromkeys(("who", "which", "which who"), "Who/Which") | {"others": "Other"}
_QUESTION_WORDS = dict.fromkeys(("who", "whom", "whose", "which"), "Who/Which") | {"where": "Other"}
_QUESTION_WORDS |= {column.lower(): column for column in ("Why", "How", "What", "When")}
RULES = ("Type", "problem type", "question word")


def intent_column(record):
    """(column of the paper's table, which of RULES said so) of an IntentBench question.

    Its `Type` where that names a column; else emer_ov_mc is Emotion and judge is Deception, and any other question goes
    by the first interrogative word in it, Other without one.
    """
    named = _INTENT_COLUMNS.get(_plain(record["extra"].get("Type")))
    if named:
        return named, "Type"
    if record["problem_type"] in ("emer_ov_mc", "judge"):
        return {"emer_ov_mc": "Emotion", "judge": "Deception"}[record["problem_type"]], "problem type"
    words = (_QUESTION_WORDS.get(word) for word in re.findall(r"[a-z]+", record["problem"].lower()))
    return next(filter(None, words), "Other"), "question word"


BREAKDOWNS = {  # benchmark: {table: (record -> labels, labels that come first)}
    "intentbench": {"question": (lambda record: [intent_column(record)[0]], list(PAPER["intentbench"]))},
    "daily-omni": {
        "type": _by_field("Type", *(value for table, value in PAPER["daily-omni"].values() if table == "type")),
        "duration": _by_field("video_duration", "30s", "60s"),
        "category": _by_field("video_category"),
    },
    "worldsense": {
        "domain": _by_field("domain", *(value for _, value in PAPER["worldsense"].values())),
        "task domain": _by_field("task_domain", "Recognition", "Understanding", "Reasoning"),
        "task type": _by_field("task_type"),
        "duration": _by_field("duration", "<1min", "1-2min", "2-4min", "4-6min", "6-8min", ">8min"),
        "audio class": _by_field("audio_class", "Speech", "Event", "Music"),  # a question may be in several
    },
}


def groups(name, records):
    """{table: {column: its records}}: first "paper", the columns of the paper's table and `Avg`, then each breakdown.

    Labels that are not known beforehand follow, sorted, then NOT_GIVEN.
    """
    tables = {}
    for table, (labels_of, known) in BREAKDOWNS[name].items():
        found = {}
        for record in records:
            for label in labels_of(record):
                found.setdefault(label, []).append(record)
        others = sorted(found.keys() - set(known), key=lambda label: (label == NOT_GIVEN, label))
        tables[table] = {label: found.get(label, []) for label in (*known, *others)}
    paper = {column: tables[table][label] for column, (table, label) in PAPER[name].items()}
    return {"paper": paper | {"Avg": list(records)}, **tables}


def columns(name, records):
    """{table: {column: (score in [0, 1] or None, number of scored questions)}}, the tables of `groups` and "letters".

    A score is the mean accuracy over the questions that have one. "letters": the multiple-choice questions once more,
    with the answer's letter taken by `strict_letter` and by `lenient_letter`.
    """
    tables = {table: {column: _score([r["accuracy"] for r in found]) for column, found in of_table.items()}
              for table, of_table in groups(name, records).items()}
    chosen = [r for r in records if r["problem_type"] == "multiple choice" and r["accuracy"] is not None]
    tables["letters"] = {rule: _score([_letter_score(r, letter) for r in chosen])
                         for rule, letter in (("strict", strict_letter), ("lenient", lenient_letter))}
    return tables


def _score(values):
    present = [value for value in values if value is not None]
    return (math.fsum(present) / len(present) if present else None), len(present)


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
    scored, published = sum(r["accuracy"] is not None for r in records), QUESTIONS[name]["Avg"]
    if scored == published == len(records):
        return ""
    return (f"{NAMES[name]} has {published:,} published questions; this score is over {scored:,}"
            + (f", {len(records) - scored:,} more have none" if scored < len(records) else ""))


def render(name, records, interval=None):
    """A text table: our scores in %, the numbers of questions, the published rows, then the other breakdowns.

    `interval`: from the accuracies of a column to (low, high) in [0, 1]; shown with each score.
    """
    found, scores, warning = groups(name, records), columns(name, records), partial(name, records)
    headers, paper = list(scores["paper"]), scores["paper"].values()
    rows = [("this run (partial)" if warning else "this run", [_percent(score) for score, _ in paper])]
    if interval:
        rows += zip(("  95 % from", "  95 % to"), zip(*(_bounds(interval, found["paper"][h]) for h in headers)))
    rows += [("  questions", [str(count) for _, count in paper]),
             ("  questions, published", [str(QUESTIONS[name].get(h, "-")) for h in headers])]
    digits = 1 if name == "worldsense" else 2  # as printed
    published = [(row, [_percent(value, 1, digits) for value in values]) for row, values in PUBLISHED[name].items()]
    lines = [f"WARNING: {warning}: the score is partial."] if warning else []
    lines += [f"{NAMES[name]}, accuracy in %, Avg over questions", _row("", headers), *(_row(*row) for row in rows),
              "-" * len(_row("", headers)), *(_row(*row) for row in published), NOTES[name]]
    if name == "intentbench":
        rules = [intent_column(record)[1] for record in records]
        lines.append("Columns by: " + ", ".join(f"{rule} ({rules.count(rule)} questions)" for rule in RULES))
    for table in BREAKDOWNS[name]:
        if {(table, label) for label in found[table]} <= set(PAPER[name].values()):
            continue  # the paper's table has it all
        lines += ["", _row(f"by {table}", ["questions", "accuracy"] + (["95 % from", "to"] if interval else []))]
        for label, (score, count) in scores[table].items():
            bounds = _bounds(interval, found[table][label]) if interval else []
            lines.append(_row(f"  {label}", [str(count), _percent(score), *bounds]))
    strict, lenient = scores["letters"].values()
    lines.append(f"\nletter taken by the official rules, {strict[1]} multiple choice questions: "
                 f"strict (Daily-Omni's) {_percent(strict[0])}, lenient (WorldSense's) {_percent(lenient[0])}")
    return "\n".join(lines)


def _bounds(interval, records):
    values = [r["accuracy"] for r in records if r["accuracy"] is not None]
    return [_percent(bound) for bound in (interval(values) if values else (None, None))]


def _row(label, cells):
    return f"{label:<30}" + "".join(f"{cell:>10}" for cell in cells)


def _percent(value, factor=100, digits=2):
    return "-" if value is None else f"{factor * value:.{digits}f}"
