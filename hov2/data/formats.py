"""Training sets as their authors publish them, turned into records of hov2's own form (docs/data.md).

A converter takes one published record and returns a dict with hov2's fields, or raises DataError for the field that
is at fault. It only moves things to where hov2 looks for them: the strict reader of hov2.data then checks the result as
it checks any other record. Fields that hov2 has no use for stay as they are, for grouping.

- "hov2": the project's own form.
- "humanomniv2": HumanOmniV2's rewritten EMER, Social-IQ 2.0 and Video-R1, or the IntentTrain folder that holds the
  three files. The videos lie beside them or, as unpacked from `videos.zip`, in `videos/`.
- "video-r1": Video-R1's RL file, and its CoT file, whose reasoning (`process`) becomes a part of the solution.
- "avqa-r1": AVQA-R1-6K, an image and a sound in each record.
- "omniinstruct": OmniInstruct's parquet files: with options (v1) multiple choice, without them free-form. Images and
  sounds are inside the parquet; they are written out once, see `read_parquet`. `train-*.parquet` names all its parts.
"""

import functools
import io
import json
import os
import re
import string
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

INTENT_TRAIN = ("emer_rewrite.json", "social_iq_v2_rewrite.json", "Video-R1_rewrite.json")
PARQUET_MEDIA = {"image": ".jpg", "audio": ".wav"}
UNPACKED = "unpacked.json"  # in the folder of a parquet's media: that all are there, and of which file they are


class DataError(ValueError):
    """Data that has to be mended before the run can go on; the message names the file or the sample."""


def files_of(name: str, path: str | Path) -> list[str]:
    """Return the data files that an entry of format `name` means: a folder or a pattern can stand for several."""
    path = Path(path)
    if name == "humanomniv2" and path.is_dir():
        files = [path / file for file in INTENT_TRAIN]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise DataError(f"{path}: the folder has no {absent[0]}; give each file that you have its own entry")
    elif name == "omniinstruct" and "*" in path.name:
        files = sorted(path.parent.glob(path.name))
        if not files:
            raise DataError(f"{path}: no file matches")
    else:
        files = [path]
    return [str(file) for file in files]


def convert(name: str, record: Any, root: Path, where: str) -> Any:
    """Convert a published `record` of format `name` to one of hov2's; what isn't an object stays as it is.

    `root` is the folder that its media paths start from, `where` how an error begins.
    """
    if not isinstance(record, dict):
        return record
    return CONVERTERS[name](record, root, where)


def _hov2(record: dict, root: Path, where: str) -> dict:
    return record


def _humanomniv2(record: dict, root: Path, where: str) -> dict:
    path = record.get("path", record.get("video"))
    converted = {key: value for key, value in record.items() if key != "video"}
    if isinstance(path, str):
        top = Path(path).parts[:1]
        converted["path"] = os.path.join(_unpacked_in(root, top), path)
    return converted


@functools.lru_cache
def _unpacked_in(root: Path, top: tuple[str, ...]) -> str:
    """Return "videos" if the media folder `top` (its name in a tuple) is there, not beside the data file; else ""."""
    beside = Path(root, *top).exists()
    in_videos = Path(root, "videos", *top).exists()
    return "videos" if in_videos and not beside else ""


def _video_r1(record: dict, root: Path, where: str) -> dict:
    converted = {key: value for key, value in record.items() if key != "process"}
    process = record.get("process")
    solution = record.get("solution")
    if process and isinstance(solution, str):
        if not isinstance(process, str) or not re.fullmatch(r"\s*<think>.*</think>\s*", process, re.DOTALL):
            raise DataError(f"{where}: process: expected <think>...</think>, got {str(process)[:60]!r}")
        converted["solution"] = f"{process.strip()}\n{solution}"
    return converted


def _omniinstruct(record: dict, root: Path, where: str) -> dict:
    for kind in PARQUET_MEDIA:
        if record[kind] is None:
            raise DataError(f"{where}: {kind}: the parquet file doesn't hold it")
    answer = record["answer"]
    options = record.get("options")
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(f"{where}: answer: expected text, got {answer!r}")
    used = ("question", "options", "id", *PARQUET_MEDIA)
    converted = {key: value for key, value in record.items() if key not in used}
    converted["problem"] = record["question"]
    converted["problem_type"] = "multiple choice" if options else "free-form"
    converted["data_type"] = "image_audio"
    converted["path"] = {kind: record[kind] for kind in PARQUET_MEDIA}
    if options:
        if answer not in options:
            raise DataError(f"{where}: answer: {answer!r} is none of the options")
        converted["options"] = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options)]
        answer = string.ascii_uppercase[options.index(answer)]
    converted["solution"] = f"<answer>{answer}</answer>"
    return converted


CONVERTERS = {
    "hov2": _hov2,
    "humanomniv2": _humanomniv2,
    "video-r1": _video_r1,
    "avqa-r1": _hov2,
    "omniinstruct": _omniinstruct,
}


# ---- Parquet ----


def read_parquet(path: str | Path, root: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield (row number from 1, row) of a parquet file of OmniInstruct, `image` and `audio` being paths of files.

    The first reading writes these to the folder `root/<the file's name without .parquet>.media`: the bytes as they are
    in the parquet, called .jpg and .wav whatever their true form (readers look at the content), samples as 16-bit WAV.
    Later ones read the text alone, until the parquet file changes. None stands for a medium that isn't there. Raises
    DataError for a file that can't be read, and without pyarrow.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: parquet needs pyarrow, which isn't installed (pip install pyarrow)") from None
    folder = Path(root, f"{Path(path).stem}.media")
    try:
        info = os.stat(path)
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            for column in ("question", "answer", *PARQUET_MEDIA):
                if column not in columns:
                    raise DataError(f"{path}: no column {column!r}; there are: {', '.join(columns)}")
            version = json.dumps([info.st_size, info.st_mtime_ns]).encode()
            if not (folder / UNPACKED).exists() or (folder / UNPACKED).read_bytes() != version:
                _unpack(file, folder)
                _replace(folder / UNPACKED, version)
            there = set(os.listdir(folder))
            texts = [column for column in columns if column not in PARQUET_MEDIA]
            for number, row in _rows(file, texts):
                for kind in PARQUET_MEDIA:
                    media_file = _media_file(folder, number, kind)
                    row[kind] = str(media_file) if media_file.name in there else None
                yield number, row
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: can't be read: {error}") from None


def _rows(file: "ParquetFile", columns: list[str], at_once: int = 1024) -> Iterator[tuple[int, dict]]:
    """Yield (row number from 1, row) of an open parquet file, read `at_once` rows at a time."""
    number = 0
    for batch in file.iter_batches(at_once, columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _unpack(file: "ParquetFile", folder: Path) -> None:
    """Write all media of an open parquet file that are there: bytes of a file, or samples of a sound."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in _rows(file, list(PARQUET_MEDIA), 16):
        for kind, value in row.items():
            media_file = _media_file(folder, number, kind)
            content = _content_of(value)
            if content is not None:
                _replace(media_file, content)
            else:
                media_file.unlink(missing_ok=True)  # of another file of that name


def _content_of(value: bytes | dict | None) -> bytes | None:
    """Return a medium of a parquet file as the content of a file of its own; None if it isn't there."""
    if isinstance(value, bytes):
        return value or None
    if not value:
        return None
    if value.get("bytes"):
        return value["bytes"]
    if value.get("array") and value.get("sampling_rate"):
        return _as_wav(value["array"], value["sampling_rate"])
    return None


def _media_file(folder: Path, number: int, kind: str) -> Path:
    return folder / f"{number:06d}{PARQUET_MEDIA[kind]}"


def _as_wav(samples: Sequence, rate: int) -> bytes:
    """Return samples in -1..1, of one channel or (channels, samples), as a WAV file of 16 bits."""
    channels = np.atleast_2d(np.asarray(samples, np.float32))  # (channels, samples)
    values = (channels.T.clip(-1, 1) * 32767).round().astype("<i2")
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.tobytes())
    return content.getvalue()


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that it is never there in part."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
