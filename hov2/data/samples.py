"""From data files to samples.

`read_samples` reads strictly: a record that can't be used is one DataError that names file, record and field.
`python -m hov2.tools.check_data CONFIG` reads everything that a config names, and says what is wrong with it.
"""

import functools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hov2.answers import PROBLEM_TYPES, check_reference
from hov2.config import SLICE, Source
from hov2.data.choices import with_letters
from hov2.data.formats import CONVERTERS, DataError, convert, files_of, read_parquet
from hov2.data.media import MediaError
from hov2.data.records import check_local, check_values, read_records
from hov2.distributed import rank, rank_zero_first
from hov2.prompts import CHOICE_TYPES, SPECIAL_TOKEN

DATA_TYPES = ("image", "video", "audio", "image_audio", "text")
RECORD_FIELDS = ("problem", "problem_type", "solution", "options", "data_type", "path", "id")
# These keep the random streams of one seed apart.
ORDER_STREAM = 0
SPARE_STREAM = 1
SLICE_STREAM = 2


class SkipSample(Exception):
    """A sample that this run can't use and may replace; the text says why."""


@dataclass(frozen=True)
class Sample:
    """One question with its media. `paths` maps "image", "video" or "audio" to a file; {} is a text-only question."""

    id: str
    problem: str
    problem_type: str
    options: tuple[str, ...] | None
    solution: str
    data_type: str
    paths: dict[str, str] = field(default_factory=dict)
    source: str = ""  # the data file
    extra: dict = field(default_factory=dict)  # the record's other fields, for grouping in evaluation
    has_sound: bool = False  # the video has a sound track; known once the file has been read (InputMaker)

    @property
    def media_kinds(self) -> tuple[str, ...]:
        """The media in the order of the prompt, such as ("video", "audio"): a video's sound is an item of its own."""
        kinds = [kind for kind in ("video", "image", "audio") if kind in self.paths]
        if self.has_sound:
            kinds.append("audio")
        return tuple(kinds)


# ---- Reading ----


def read_samples(sources: Iterable[Source], seed: int = 0) -> list[Sample]:
    """Return the samples of all `sources` in order, each source cut to its slice; `seed` is for random slices.

    All records of a source are checked, also those outside the slice; media files aren't looked for until they are
    loaded. Raises DataError for the first bad record and for a source of which nothing is left. With the source's
    `on_bad_record: "skip"`, the slice's bad records are left out with a warning that counts them.
    """
    samples = []
    sources = list(sources)
    if not sources:
        raise DataError("data: expected at least one data file, got none")
    for source in sources:
        kept, errors, count = read_slice(source, seed)
        if errors and source.on_bad_record == "error":
            raise DataError(
                f"{errors[0]} ({len(errors)} of {count} records can't be used; the config's entry can "
                'leave them out: on_bad_record: "skip")'
            )
        if not kept:
            raise DataError(f"{source.path}: no record of slice {source.slice!r} can be used")
        if errors and rank() == 0:
            warnings.warn(f"{source.path}: {len(errors)} of {count} records left out; first: {errors[0]}", stacklevel=2)
        samples += kept
    return samples


def read_slice(source: Source, seed: int = 0) -> tuple[list[Sample], list[DataError], int]:
    """Return the samples of the source's slice, the errors, and how many records were checked.

    Checked are all records of the source where one bad record would stop a run, and those of the slice where bad
    records are left out. Raises DataError for a file that can't be read as such, and for a slice without a record.
    """
    records = read_source(source)
    in_slice = take_slice(records, source.slice, seed)
    if not in_slice:
        raise DataError(f"{source.path}: slice {source.slice!r} of {len(records)} records leaves none")
    checked = records if source.on_bad_record == "error" else in_slice
    samples = [record for record in in_slice if isinstance(record, Sample)]
    errors = [record for record in checked if isinstance(record, DataError)]
    return samples, errors, len(checked)


def read_source(source: Source) -> list[Sample | DataError]:
    """Return every record of a `source`, uncut: a Sample, or the DataError that says what is wrong with it.

    hov2's own files, and the published ones in JSON, are a list or one object a line. Raises DataError for a file that
    can't be read as such.
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
        for number, record in records:
            found.append(tried(_to_checked_sample, record, source.format, number, file, root))
    return found


def take_slice(items: Sequence, text: str, seed: int = 0) -> list:
    """Return `items` cut to "all" or "first|last|random:N" or "...:N%".

    Percentages round down at either end, so "first:50%" and "last:50%" never share an item. N beyond the end takes all.
    A random slice keeps the order of the file.
    """
    if text == "all":
        return list(items)
    match = SLICE.fullmatch(text)
    if not match or (match[3] and Fraction(match[3]) > 100):
        raise DataError(f"slice {text!r}: expected all, first:N, last:N or random:N; N may be a percentage (50%)")
    where, number, percentage = match.groups()
    if number:
        count = min(int(number), len(items))
    else:
        count = math.floor(len(items) * Fraction(percentage) / 100)
    if where == "first":
        return list(items[:count])
    if where == "last":
        return list(items[len(items) - count :])
    drawn = permutation(len(items), seed, SLICE_STREAM, 0)[:count].tolist()
    return [items[position] for position in sorted(drawn)]


def _to_checked_sample(record: Any, format_name: str, number: int, path: str, root: Path) -> Sample:
    """Convert a published record; raises DataError, also for a solution that has no usable answer."""
    where = f"{path}: record {number}"
    check_values(record, where)
    sample = to_sample(convert(format_name, record, root, where), number, path, root)
    try:
        check_reference(sample.solution, sample.problem_type, sample.options)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    return sample


def to_sample(record: Any, number: int, path: str | Path, root: Path) -> Sample:
    """Convert a record in hov2's own form (docs/data.md, "Your own data"); its media paths start from `root`.

    Raises DataError prefixed with the data file's `path` and the record's `number`. A `record` that is a DataError
    itself is raised as it is.
    """
    if isinstance(record, DataError):
        raise record
    where = f"{path}: record {number}"
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object, got {type(record).__name__}")
    texts = read_texts(record, where)
    sample_id = record.get("id")
    if sample_id is None:
        sample_id = f"{Path(path).name}:{number}"
    data_type, paths = _paths(record, where)
    return Sample(
        id=str(sample_id),
        problem=texts.problem,
        problem_type=texts.problem_type,
        options=texts.options,
        solution=texts.solution,
        data_type=data_type,
        paths={kind: os.path.abspath(Path(root, file)) for kind, file in paths.items()},
        source=str(path),
        extra={key: value for key, value in record.items() if key not in RECORD_FIELDS},
    )


def text_field(record: dict, name: str, where: str) -> str:
    """Return the text in a record's field `name`; raises DataError prefixed with `where` if there is none."""
    if name not in record:
        raise DataError(f"{where}: missing field {name!r}")
    if not isinstance(record[name], str) or not record[name].strip():
        raise DataError(f"{where}: {name}: expected text, got {record[name]!r}")
    return record[name]


class Texts(NamedTuple):
    """What a record says in words; the options of a choice have letters."""

    problem: str
    options: tuple[str, ...] | None
    solution: str
    problem_type: str


def read_texts(
    record: dict,
    where: str,
    names: tuple[str, str, str] = ("problem", "options", "solution"),
    problem_type: str | None = None,
) -> Texts:
    """Return the texts of a record whose problem, options and solution are in the fields `names`.

    `problem_type`: for records without such a field. Raises DataError prefixed with `where` for a text that is missing
    or can't be one, for an unknown type, and for a choice's answer that is none of its options.
    """
    problem_name, options_name, solution_name = names
    problem = text_field(record, problem_name, where)
    solution = text_field(record, solution_name, where)
    if not problem_type:
        problem_type = text_field(record, "problem_type", where)
    if problem_type not in PROBLEM_TYPES:
        raise DataError(f"{where}: problem_type: unknown {problem_type!r}; known: {', '.join(PROBLEM_TYPES)}")
    options = record.get(options_name) or []
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise DataError(f"{where}: {options_name}: expected a list of texts or null, got {options!r}")
    for name, text in zip(names, (problem, "\n".join(options), solution)):
        special = SPECIAL_TOKEN.search(text)
        if special:
            raise DataError(f"{where}: {name}: {special[0]} has the form of a special token, no part of a text")
    if problem_type in CHOICE_TYPES:
        if not options:
            raise DataError(f"{where}: {options_name}: {problem_type!r} needs them")
        try:
            options, solution = with_letters(options, solution, options_name)
        except ValueError as error:
            raise DataError(f"{where}: {solution_name}: {error}") from None
    return Texts(problem, tuple(options) or None, solution, problem_type)


def _paths(record: dict, where: str) -> tuple[str, dict[str, str]]:
    """Return a record's data type and {kind: file}.

    An object of paths is image_audio, also where it is published as image.
    """
    path = record.get("path")
    data_type = record.get("data_type")
    if isinstance(path, dict) and data_type in (None, "image", "audio"):
        data_type = "image_audio"
    if data_type not in DATA_TYPES:
        raise DataError(f"{where}: data_type: unknown {data_type!r}; known: {', '.join(DATA_TYPES)}")
    if data_type == "text":
        kinds, expected = (), "none for text"
    elif data_type == "image_audio":
        kinds, expected = ("image", "audio"), "an object with image and audio"
    else:
        kinds, expected = (data_type,), "a file"
    if isinstance(path, dict):
        files = path
    elif path is None:
        files = {}
    else:
        files = {data_type: path}
    if set(files) != set(kinds):
        raise DataError(f"{where}: path: expected {expected}, got {path!r}")
    paths = {kind: text_field(files, kind, f"{where}: path") for kind in kinds}
    for file in paths.values():
        check_local(file, f"{where}: path")
    return data_type, paths


def tried(function: Callable, *args: Any) -> Any:
    """Return what the function returns, or the exception that says why a sample can't be had."""
    try:
        return function(*args)
    except (DataError, MediaError, SkipSample) as error:
        return error


@functools.lru_cache(maxsize=8)
def permutation(size: int, seed: int, stream: int, round_: int) -> np.ndarray:
    """Return a random order of `size` items: number `round_` of one of a seed's random streams."""
    sequence = np.random.SeedSequence([seed, stream, round_])
    return np.random.default_rng(sequence).permutation(size)
