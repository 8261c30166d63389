"""Configs in and out: JSON and `key=value` in, dataclasses out, nothing unknown accepted.

`load_config(GRPOConfig, "configs/stage2.json", ["max_steps=4", "media.max_frames=16"])` reads a JSON file, applies
`key=value` overrides (dots reach into nested objects, values are JSON or plain text) and returns a dataclass of
config.py whose every field has the declared type. Anything else is one `ConfigError` that names the file, the key and
what would be right.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from hov2.config import BaseConfig, ConfigError, EvalConfig, GRPOConfig, SFTConfig, fault_of_text

AnyConfig = TypeVar("AnyConfig")
IN_WORDS = {dict: "an object", list: "a list", float: "a number"}  # types whose own names JSON doesn't have


def load_config(cls: type[AnyConfig], path: str | Path | None, overrides: Iterable[str] = ()) -> AnyConfig:
    """Read `path` (JSON) into the dataclass `cls`, and apply `key=value` overrides; without a path only these count.

    Raises ConfigError for a missing file, broken JSON, an unknown key (naming the nearest known one), a missing
    required key, or a value of the wrong type.
    """
    values = _read_json(path) if path else {}
    for override in overrides:
        _apply_override(values, override)
    try:
        return _build(cls, values, where=str(path or "key=value"))
    except RecursionError:
        raise ConfigError(f"{path or 'key=value'}: nested too deeply") from None


def read_config(path: str | Path, overrides: Iterable[str] = ()) -> BaseConfig:
    """Read the config at `path` as the class (SFT, GRPO or evaluation) that knows most of its keys."""
    keys = set(_read_json(path))

    def known_keys(cls: type[BaseConfig]) -> int:
        return len(keys & {field.name for field in dataclasses.fields(cls)})

    cls = max((EvalConfig, SFTConfig, GRPOConfig), key=known_keys)
    return load_config(cls, path, overrides)


def save_config(config: BaseConfig, folder: str | Path) -> None:
    """Write the resolved config to `folder/config.json`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(config), indent=2)
    (folder / "config.json").write_text(text + "\n")


def config_from_argv(cls: type[AnyConfig], argv: Sequence[str], default: str | None) -> AnyConfig:
    """Read the config that `[config.json] [key=value ...]` names; `default` is its file, if any, when none is named."""
    overrides = [argument for argument in argv if "=" in argument]
    paths = [argument for argument in argv if "=" not in argument]
    has_option = any(argument.startswith("-") for argument in argv)
    if has_option or len(paths) > 1:
        raise ConfigError(f"expected [config.json] [key=value ...], got {' '.join(argv)}")
    path = paths[0] if paths else default
    return load_config(cls, path, overrides)


def _read_json(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in a file."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: no such config file, or not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Set what `override`, a `key=value`, says, in place; objects on the way to a nested key are made."""
    key, separator, text = override.partition("=")
    if not key or not separator:
        raise ConfigError(f"override {override!r}: expected key=value")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text  # plain words need no quotes
    *parents, last = key.split(".")
    target = values
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(f"override {override!r}: {parent} is not an object")
    target[last] = value


def _build(cls: type[AnyConfig], values: dict[str, Any], where: str) -> AnyConfig:
    """Return the dataclass `cls` with `values`; `where` (file and key) begins the message of an error."""
    types_of_keys = typing.get_type_hints(cls)
    for key in values:
        if key not in types_of_keys:
            raise ConfigError(f"{where}: unknown key {key!r}; {_hint(key, types_of_keys)}")
    missing = [repr(field.name) for field in dataclasses.fields(cls) if is_required(field) and field.name not in values]
    if missing:
        raise ConfigError(f"{where}: missing key {', '.join(missing)}")
    checked = {}
    for key, value in values.items():
        checked[key] = _check(types_of_keys[key], value, f"{where}: {key}")
    try:
        return cls(**checked)
    except ConfigError as error:  # of __post_init__, which doesn't know the file
        raise ConfigError(f"{where}: {error}") from None


def is_required(field: dataclasses.Field) -> bool:
    """Say whether a config must give this key, since it has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _hint(key: str, known: Iterable[str]) -> str:
    """Return what helps with an unknown key: the nearest known one, else all of them."""
    nearest = difflib.get_close_matches(key, known, n=1)
    if nearest:
        return f"did you mean {nearest[0]!r}?"
    return f"known keys: {', '.join(sorted(known))}"


def _check(kind: Any, value: Any, where: str) -> Any:
    """Return `value` as the type `kind`, one of the few forms that config.py uses; ConfigError if it isn't one."""
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):  # X | None; of a Literal it is the latter
        if value is None:
            return None
        return _check(arguments[0], value, where)
    if origin is Literal:
        if value not in arguments:
            choices = ", ".join(repr(choice) for choice in arguments)
            raise ConfigError(f"{where}: {value!r} is not one of {choices}")
        return value
    if dataclasses.is_dataclass(kind):
        _check_plain(dict, value, where)
        return _build(kind, value, where)
    if origin is list:
        _check_plain(list, value, where)
        return [_check(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        _check_plain(dict, value, where)
        checked = {}
        for key, item in value.items():
            checked[_check(arguments[0], key, where)] = _check(arguments[1], item, f"{where}.{key}")
        return checked
    _check_plain(kind, value, where)
    try:
        return kind(value)  # a whole number given for a float becomes one
    except OverflowError:
        raise ConfigError(f"{where}: too large a number") from None


def _check_plain(kind: type, value: Any, where: str) -> None:
    """Raise ConfigError for a value that isn't of a plain type: str, int, float, bool, list or dict."""
    if isinstance(value, bool):  # for Python it would be an int, too
        fits = kind is bool
    elif kind is float:
        fits = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    else:
        fits = isinstance(value, kind)
    if isinstance(value, str) and fault_of_text(value):
        raise ConfigError(f"{where}: {fault_of_text(value)}")
    if not fits:
        raise ConfigError(f"{where}: expected {IN_WORDS.get(kind, kind.__name__)}, got {value!r}")
