"""From data files to samples. `read_samples` reads strictly: a record that can't be used is one DataError that names
file, record and field. `python -m hov2.tools.check_data CONFIG` reads everything that a config names, and says what is
wrong with it.
"""

import functools
import json
import math
import os
import re
import warnings
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

from hov2.answers import PROBLEM_TYPES, check_reference
from hov2.data.formats import CONVERTERS, DataError, convert, files_of, read_parquet
from hov2.data.media import MediaError
from hov2.distributed import rank, rank_zero_first
from hov2.prompts import CHOICE_TYPES, SPECIAL_TOKEN

DATA_TYPES = ("image", "video", "audio", "image_audio", "text")
RECORD_FIELDS = ("problem", "problem_type", "solution", "options", "data_type", "path", "id")
ORDER_STREAM, SPARE_STREAM, SLICE_STREAM = range(3)  # keep the random streams of one seed apart



class SkipSample(Exception):
    """A sample that this run can't use and may replace; the text says why."""


@dataclass(frozen=True)
class Sample:
    """One question with its media. `paths` maps "image", "video" or "audio" to a file; {} is a text-only question."""

    id: str
    problem: str
    problem_type: str
    options: tuple | None
    solution: str
    data_type: str
    paths: dict = field(default_factory=dict)
    source: str = ""  # the data file
    extra: dict = field(default_factory=dict)  # the record's other fields, for grouping in evaluation
    has_sound: bool = False  # the video has a sound track; known once the file has been read (InputMaker)

    @property
    def media_kinds(self):
        """The media in the order of the prompt, such as ("video", "audio"): a video's sound is an item of its own."""
        kinds = tuple(kind for kind in ("video", "image", "audio") if kind in self.paths)
        return kinds + ("audio",) if self.has_sound else kinds


# ---- Reading ----


def read_samples(sources, seed=0):
    """The samples of all `sources` (config.Source), in order, each cut to its slice; `seed` is for random slices.

    All records of a source are checked, also those outside the slice; media files aren't looked for until they are
    loaded. Raises DataError for the first bad record and for a source of which nothing is left. With the source's
    `on_bad_record: "skip"`, the slice's bad records are left out with a warning that counts them.
    """
    samples = []
    for source in sources:
        kept, errors, count = read_slice(source, seed)
        if errors and source.on_bad_record == "error":
            raise DataError(f"{errors[0]} ({len(errors)} of {count} records can't be used; the config's entry can "
                            'leave them out: on_bad_record: "skip")')
        if not kept:
            raise DataError(f"{source.path}: no record of slice {source.slice!r} can be used")
        if errors and rank() == 0:
            warnings.warn(f"{source.path}: {len(errors)} of {count} records left out; first: {errors[0]}", stacklevel=2)
        samples += kept
    return samples


def read_slice(source, seed=0):
    """(samples of the source's slice, a DataError for each bad record, records looked through for such).

    These are all of the source's where one of them would stop a run, and the slice's where they are left out.

    Raises DataError for a file that can't be read as such, and for a slice without a record.
    """
    found = read_source(source)
    cut = take_slice(found, source.slice, seed)
    if not cut:
        raise DataError(f"{source.path}: slice {source.slice!r} of {len(found)} records leaves none")
    looked = found if source.on_bad_record == "error" else cut
    errors = [item for item in looked if isinstance(item, DataError)]
    return [item for item in cut if isinstance(item, Sample)], errors, len(looked)


def read_source(source):
    """Every record of a `source`, uncut: a Sample, or the DataError that says what is wrong with it.

    hov2's own files, and the published ones in JSON, are a list (.json) or one object a line (.jsonl), UTF-8. Raises
    DataError for a file that can't be read as such.
    """
    if source.format not in CONVERTERS:
        raise DataError(f"{source.path}: unknown format {source.format!r}; known: {', '.join(CONVERTERS)}")
    found = []
    for file in files_of(source.format, source.path):
        root = Path(source.media_root) if source.media_root else Path(file).parent
        if source.format == "omniinstruct":
            with rank_zero_first():  # the first to read it writes out its media
                records = list(read_parquet(file, root))
        else:
            records = read_records(file)
        found += [tried(_read, record, source.format, number, file, root) for number, record in records]
    return found


def take_slice(items, text, seed=0):
    """`items` cut to "all" or "first|last|random:N" or "...:N%".

    Percentages round down at either end, so "first:50%" and "last:50%" never share an item. N beyond the end takes all.
    A random slice keeps the order of the file.
    """
    if text == "all":
        return list(items)
    match = re.fullmatch(r"(first|last|random):(?:(\d+)|(\d+(?:\.\d+)?)%)", text)
    if not match or (match[3] and Fraction(match[3]) > 100):
        raise DataError(f"slice {text!r}: expected all, first:N, last:N or random:N; N may be a percentage (50%)")
    where = match[1]
    count = min(int(match[2]), len(items)) if match[2] else math.floor(len(items) * Fraction(match[3]) / 100)
    if where == "random":
        return [items[i] for i in sorted(permutation(len(items), seed, SLICE_STREAM, 0)[:count].tolist())]
    return list(items[:count] if where == "first" else items[len(items) - count:])


def read_records(path):
    """(record number from 1, record) of a JSON list or of JSON lines; the number of a line is that of the file.

    For a line that is no JSON the record is a DataError. Raises DataError for a file that can't be read as such.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = " (evaluate.py configs/filter_stageN.json writes it)" if "filter" in str(path) else ""
        raise DataError(f"{path}: no such data file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read: {error}") from None
    if str(path).endswith(".jsonl"):
        return [(number, tried(_parsed, line, f"{path}: record {number}"))
                for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    records = _parsed(text, path)
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a list of records (one object a line needs the ending .jsonl)")
    return enumerate(records, 1)


def _parsed(text, where):
    """What the JSON `text` says; DataError if it isn't any."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None


def _read(record, name, number, path, root):
    """One record of the format `name` -> Sample. Raises DataError, also for a solution that has no usable answer."""
    where = f"{path}: record {number}"
    sample = to_sample(convert(name, record, root, where), number, path, root)
    try:
        check_reference(sample.solution, sample.problem_type)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    return sample


def to_sample(record, number, path, root):
    """A record in hov2's own form -> Sample (method.md, "Samples"), its media paths starting from `root`.

    Raises DataError, which begins with the data file's `path` and the record's `number`, also one that `record` is.
    """
    if isinstance(record, DataError):
        raise record
    where = f"{path}: record {number}"
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object, got {type(record).__name__}")
    problem, options, solution, problem_type = read_texts(record, where)
    if problem_type in CHOICE_TYPES and not options:
        raise DataError(f"{where}: options: {problem_type!r} needs them")
    own_id = record.get("id")
    data_type, paths = _paths(record, where)
    return Sample(
        id=f"{Path(path).name}:{number}" if own_id is None else str(own_id), problem=problem,
        problem_type=problem_type, options=options, solution=solution, data_type=data_type, source=str(path),
        paths={kind: os.path.abspath(Path(root, file)) for kind, file in paths.items()},
        extra={key: value for key, value in record.items() if key not in RECORD_FIELDS},
    )


def text_field(record, name, where):
    """The text in a record's field `name`; DataError, which begins with `where`, if there is none."""
    if name not in record:
        raise DataError(f"{where}: missing field {name!r}")
    if not isinstance(record[name], str) or not record[name].strip():
        raise DataError(f"{where}: {name}: expected text, got {record[name]!r}")
    return record[name]


def read_texts(record, where, names=("problem", "options", "solution"), problem_type=None):
    """(problem, options or None, solution, problem type) of a record that calls the first three `names`.

    `problem_type`: for records without such a field. Raises DataError, which begins with `where`, for a text that is
    missing or can't be one, or for an unknown type.
    """
    problem, solution = (text_field(record, name, where) for name in names[::2])
    problem_type = problem_type or text_field(record, "problem_type", where)
    if problem_type not in PROBLEM_TYPES:
        raise DataError(f"{where}: problem_type: unknown {problem_type!r}; known: {', '.join(PROBLEM_TYPES)}")
    options = record.get(names[1]) or []
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise DataError(f"{where}: {names[1]}: expected a list of texts or null, got {options!r}")
    for name, text in zip(names, (problem, "\n".join(options), solution)):
        if special := SPECIAL_TOKEN.search(text):
            raise DataError(f"{where}: {name}: {special[0]} has the form of a special token, no part of a text")
    return problem, tuple(options) or None, solution, problem_type


def _paths(record, where):
    """(data type, {kind: file}) of a record; an object of paths is image_audio, also where it is published as image."""
    path, data_type = record.get("path"), record.get("data_type")
    if isinstance(path, dict) and data_type in (None, "image", "audio"):
        data_type = "image_audio"
    if data_type not in DATA_TYPES:
        raise DataError(f"{where}: data_type: unknown {data_type!r}; known: {', '.join(DATA_TYPES)}")
    kinds = {"text": (), "image_audio": ("image", "audio")}.get(data_type, (data_type,))
    files = path if isinstance(path, dict) else {} if path is None else {data_type: path}
    if set(files) != set(kinds):
        expected = {"text": "none for text", "image_audio": "an object with image and audio"}.get(data_type, "a file")
        raise DataError(f"{where}: path: expected {expected}, got {path!r}")
    return data_type, {kind: text_field(files, kind, f"{where}: path") for kind in kinds}


def tried(function, *args):
    """What the function returns, or the exception that says why a sample can't be had."""
    try:
        return function(*args)
    except (DataError, MediaError, SkipSample) as error:
        return error


@functools.lru_cache(maxsize=8)
def permutation(size, seed, stream, round_):
    return np.random.default_rng(np.random.SeedSequence([seed, stream, round_])).permutation(size)
