"""What JSON data files hold, as it is written: lists of records, or one record a line.

Files are read whatever they are called, in UTF-8, UTF-16 or UTF-32, with or without a byte-order mark. A record that
can't be read costs no other: it is a DataError in its place.
"""

import json
import re
from pathlib import Path
from typing import Any

from hov2.config import URL, fault_of_text
from hov2.data.formats import DataError

DEEPEST = 100  # lists and objects within each other, in one record
_STRING_OR_SIGN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)


def read_records(path: str | Path) -> list[tuple[int, Any]]:
    """Return (record number from 1, record) of a JSON list or of JSON lines; a line's number is that in the file.

    For a record that is no JSON it is a DataError. Raises DataError for a file that can't be read as such.
    """
    text = _read_text(path)
    one_a_line = str(path).endswith(".jsonl")
    try:
        content = _parsed(text, path)
    except DataError as error:
        content = error
    if isinstance(content, list):
        return list(enumerate(content, 1))
    if not isinstance(content, DataError) and not one_a_line:
        raise DataError(f"{path}: expected a list of records, or one object a line; got {type(content).__name__}")
    if text.lstrip().startswith("["):
        items = _items(text)
        if items:
            return _parsed_one_by_one(items, path)
        if not one_a_line:
            raise content
    records = _parsed_one_by_one(text.split("\n"), path)
    if not one_a_line and not any(isinstance(record, dict) for _, record in records):
        raise content
    return records


def read_json(path: str | Path) -> Any:
    """Return what a JSON file says; DataError if it can't be read."""
    return _parsed(_read_text(path), path)


def check_values(record: Any, where: str) -> None:
    """Raise DataError for a text in the record that is none, or for lists in lists without end.

    The message begins with `where` and the record's field.
    """
    level = [(where, record)]
    for depth in range(DEEPEST):
        below = []
        for name, value in level:
            if isinstance(value, str) and fault_of_text(value):
                raise DataError(f"{name}: {fault_of_text(value)}")
            if isinstance(value, dict):
                for key, item in value.items():
                    below += [(name, key), (f"{name}: {key}" if depth == 0 else name, item)]
            elif isinstance(value, list):
                below += [(name, item) for item in value]
        level = below
    if level:
        raise DataError(f"{level[0][0]}: more than {DEEPEST} lists or objects within each other")


def check_local(path: str, where: str) -> None:
    """Raise DataError, prefixed with `where`, for a path that no local file can have."""
    if URL.match(path):
        raise DataError(f"{where}: {path[:200]!r} is a URL; only local files are read")
    if "\0" in path:
        raise DataError(f"{where}: {path!r} is no path: it holds a null character")


def _read_text(path: str | Path) -> str:
    """Return the file's text; bytes that are no UTF-8 become halves of surrogate pairs, which `check_values` finds."""
    try:
        content = Path(path).read_bytes()
        return content.decode(json.detect_encoding(content), "surrogateescape")
    except FileNotFoundError:
        hint = " (evaluate.py configs/filter_stageN.json writes it)" if "filter" in str(path) else ""
        raise DataError(f"{path}: no such data file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read: {error}") from None


def _parsed_one_by_one(texts: list[str], path: str | Path) -> list[tuple[int, Any]]:
    """Return (number from 1, what the text says or the DataError) of each text that isn't empty."""
    records = []
    for number, text in enumerate(texts, 1):
        if text.strip():
            try:
                record = _parsed(text, f"{path}: record {number}")
            except DataError as error:
                record = error
            records.append((number, record))
    return records


def _parsed(text: str, where: str | Path) -> Any:
    """What the JSON `text` says; DataError if it isn't any."""
    try:
        return json.loads(text, parse_int=_whole_number)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
    except RecursionError:
        raise DataError(f"{where}: lists or objects within each other, too deep to be read") from None


def _whole_number(digits: str) -> int | str:
    """Return the number; one of thousands of digits, which Python doesn't convert, as its text."""
    try:
        return int(digits)
    except ValueError:
        return digits


def _items(text: str) -> list[str]:
    """Return the items of a JSON list as text, told apart by brackets and commas; [] if these don't fit together."""
    items = []
    depth = 0
    start = 0
    for match in _STRING_OR_SIGN.finditer(text):
        sign = match[0]
        if sign in ("[", "{"):
            depth += 1
            if depth == 1:
                start = match.end()
        elif sign in ("]", "}"):
            depth -= 1
            if depth == 0:
                items.append(text[start : match.start()])
                start = match.end()
                break
        elif sign == "," and depth == 1:
            items.append(text[start : match.start()])
            start = match.end()
    is_whole = depth == 0 and not text[start:].strip()
    return items if is_whole else []
