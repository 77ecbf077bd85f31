"""A comparison as JSON and back, so that a report can be made again without the runs."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path

from lossmith.errors import InputError
from lossmith.reporting.comparison import Comparison

FORMAT = "lossmith-comparison"
VERSION = 1
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def comparison_to_json(comparison: Comparison) -> dict[str, object]:
    """A plain dictionary for ``json.dumps(..., allow_nan=False)``.

    Numbers that are not finite, which JSON lacks, become the strings ``"nan"``, ``"inf"`` and ``"-inf"``. In
    ``configuration`` and ``environment`` tuples become lists and anything that is not JSON its ``str``.

    >>> from lossmith.reporting.comparison import Run
    >>> run = Run("a", 0, {"loss": math.inf})
    >>> comparison = Comparison("t", "q", {"a": ""}, "a", "loss", ("loss",), (run,))
    >>> comparison_to_json(comparison)["runs"][0]["metrics"]
    {'loss': 'inf'}
    >>> comparison_from_json(comparison_to_json(comparison)) == comparison
    True
    """
    plain = _plain(comparison)
    assert isinstance(plain, dict)
    return {"format": FORMAT, "version": VERSION, **plain}


def comparison_from_json(data: Mapping[str, object] | str, *, name: str = "the comparison") -> Comparison:
    """The comparison that :func:`comparison_to_json` wrote, from its dictionary or its JSON text.

    Unknown fields are ignored, missing ones with a default get it. ``InputError`` (``name`` says in which
    file) names the field that is missing or of a wrong kind.
    """
    if isinstance(data, str):
        try:
            data = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name} is not JSON: {error}") from None
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise InputError(f"{name} is not a saved comparison: it lacks the field format: {FORMAT!r}")
    if data.get("version") != VERSION:
        raise InputError(f"{name} has format version {data.get('version')!r}; this Lossmith reads version {VERSION}")
    read = _read(Comparison, data, name)
    assert isinstance(read, Comparison)
    return read


def read_comparison(path: str | Path) -> Comparison:
    """Read a file that :func:`write_all` wrote (``comparison.json``), or the folder that holds it."""
    path = Path(path)
    if path.is_dir():
        path = path / "comparison.json"
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"there is no {path}: name a folder that a comparison was written to") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start})") from None
    return comparison_from_json(content, name=str(path))


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        if set(map(type, value)) <= {float, int} and all(map(math.isfinite, value)):
            return list(value)  # the points of a curve, of which there may be millions
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    item = getattr(value, "item", None)  # a number of numpy
    return _plain(item()) if callable(item) and getattr(value, "ndim", None) == 0 else str(value)


def _read(kind: typing.Any, value: object, where: str) -> object:
    """``value`` as the annotated ``kind``: a dataclass, a tuple or mapping, an optional, or a plain value."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise InputError(f"{where} must be a JSON object, found {_short(value)}")
        hints = typing.get_type_hints(kind)
        fields = {}
        for field in dataclasses.fields(kind):
            if field.name in value:
                fields[field.name] = _read(hints[field.name], value[field.name], f"{where}: {field.name}")
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise InputError(f"{where} lacks the field {field.name!r}")
        return kind(**fields)  # type: ignore[operator]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _read(arguments[0], value, where)
    if origin is typing.Literal:
        if value not in arguments:
            allowed = ", ".join(repr(argument) for argument in arguments)
            raise InputError(f"{where} is {_short(value)}, allowed are {allowed}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise InputError(f"{where} must be a JSON list, found {_short(value)}")
        if set(map(type, value)) <= {arguments[0]}:
            return tuple(value)
        return tuple(_read(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping or getattr(origin, "__name__", "") == "Mapping":
        if not isinstance(value, Mapping):
            raise InputError(f"{where} must be a JSON object, found {_short(value)}")
        return {str(key): _read(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    return _scalar(kind, value, where)


def _scalar(kind: object, value: object, where: str) -> object:
    if kind is object:
        return value
    if kind is float and isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{where} must be {getattr(kind, '__name__', kind)}, found {_short(value)}")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
