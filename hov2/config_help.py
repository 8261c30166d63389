"""What `--help` prints: every key of a config with its type, its default and its comment in config.py."""

import ast
import dataclasses
import inspect
import io
import json
import textwrap
import tokenize
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from hov2.config_io import is_required

WIDTH = 100
COLUMN = 34  # where explanations begin; a longer key has its own line
IN_WORDS = {str: "text", int: "int", float: "number", bool: "true | false", types.NoneType: "null", Any: "any value"}


@dataclass
class Key:
    """A key of a config, and what can be said about it."""

    name: str  # with the names of the objects that it is in: "media.fps"; "data[].path" in each object of a list
    kind: str  # its type, in words
    default: str  # as an override would give it; "" for none
    comment: str
    group: type  # the class that declares it


def help_text(config_class: type, script: str, about: str, default: str) -> str:
    """Return what `script --help` prints; `about` is the script's docstring, `default` the config that it takes."""
    summary_and_examples = about.split("\n\n")[:2]
    usage = f"usage: {script} [config.json] [key=value ...]"
    keys = f"Without a config it takes {default}. The keys of a config, each with its default and (type):"
    return "\n\n".join([usage, *summary_and_examples, keys, key_table(config_keys(config_class))])


def key_table(keys: list[Key]) -> str:
    """Return the keys as text of two columns, with a blank line where another class begins."""
    lines = []
    group = keys[0].group
    for key in keys:
        if key.group is not group:
            lines.append("")
        group = key.group
        lines.extend(key_lines(key))
    return "\n".join(lines)


def key_lines(key: Key) -> list[str]:
    """Return the lines of one key: `name=default   (type) comment`."""
    left = f"  {key.name}"
    if key.default:
        left += f"={key.default}"
    right = textwrap.wrap(f"({key.kind}) {key.comment}", WIDTH - COLUMN)
    lines = [" " * COLUMN + line for line in right]
    if len(left) < COLUMN - 1:
        lines[0] = left.ljust(COLUMN) + right[0]
    else:
        lines.insert(0, left)
    return lines


def config_keys(config_class: type, parent: str = "") -> list[Key]:
    """Return the keys of a config class, each object's own keys behind it; `parent` begins the names: "media."."""
    types_of_keys = typing.get_type_hints(config_class)
    comments = field_comments(config_class)
    keys = []
    for field in dataclasses.fields(config_class):
        kind = types_of_keys[field.name]
        key = Key(
            name=parent + field.name,
            kind=in_words(kind),
            default=default_of(field),
            comment=comments[field.name],
            group=declaring_class(config_class, field.name),
        )
        keys.append(key)
        if is_required(field):
            key.kind += ", required"
        nested = nested_class(kind)
        if nested is not None:
            about_object = inspect.getdoc(nested).splitlines()[0]
            key.comment = f"{about_object} {key.comment}".strip()
            key.group = nested
            inside = f"{key.name}[]." if typing.get_origin(kind) is list else f"{key.name}."
            keys.extend(config_keys(nested, inside))
    return keys


def field_comments(config_class: type) -> dict[str, str]:
    """Return the comment behind each field of a dataclass, or above it, from the source; "" for a field without one.

    A field that a class repeats for another default keeps the comment of the class that it inherits from.
    """
    found = {}
    for cls in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        source = inspect.getsource(cls)
        comments = comments_by_line(source)
        first_line = 1
        for statement in ast.parse(source).body[0].body:
            if isinstance(statement, ast.AnnAssign):
                lines = range(first_line, statement.end_lineno + 1)
                text = " ".join(comments[line] for line in lines if line in comments)
                name = statement.target.id
                found[name] = text or found.get(name, "")
            first_line = statement.end_lineno + 1
    return found


def comments_by_line(source: str) -> dict[int, str]:
    """Return the comments of Python source by the number of their line."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    return comments


def declaring_class(config_class: type, name: str) -> type:
    """Return the first of a class's bases, or the class itself, that has a field of this name."""
    declaring = [cls for cls in config_class.__mro__ if name in inspect.get_annotations(cls)]
    return declaring[-1]


def default_of(field: dataclasses.Field) -> str:
    """Return a field's default as an override would give it; "" if it has none, or is an object of own keys."""
    if is_required(field):
        return ""
    value = field.default
    if value is dataclasses.MISSING:
        value = field.default_factory()
    if dataclasses.is_dataclass(value):
        return ""
    if isinstance(value, str):
        return value
    return json.dumps(value)


def nested_class(kind: Any) -> type | None:
    """Return the dataclass that a type such as `X`, `X | None` or `list[X]` has in it; None if it has none."""
    for part in (kind, *typing.get_args(kind)):
        if dataclasses.is_dataclass(part):
            return part
    return None


def in_words(kind: Any) -> str:
    """Return a type as a reader of JSON would say it: "int | null", "auto | never", "list of text"."""
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return "object"
    if origin is Literal:
        choices = [choice if isinstance(choice, str) else json.dumps(choice) for choice in arguments]
        return " | ".join(choices)
    if origin in (types.UnionType, typing.Union):
        return " | ".join(in_words(argument) for argument in arguments)
    if origin is list:
        item = "objects" if nested_class(kind) else in_words(arguments[0])
        return f"list of {item}"
    if origin is dict:
        return f"object of {in_words(arguments[0])}: {in_words(arguments[1])}"
    return IN_WORDS[kind]
