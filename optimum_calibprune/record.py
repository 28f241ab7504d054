# SPDX-License-Identifier: Apache-2.0
"""What all records share: to and from plain dictionaries and JSON; and the error for a name that does not exist."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Self


SCHEMA_VERSION = 1


def unknown(kind: str, given: str, allowed: Iterable[str]) -> ValueError:
    """The error for a name that does not exist; it lists the names that do and points to the nearest."""
    names = list(allowed)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"Unknown {kind} {given!r}.{hint} Allowed: {', '.join(names)}.")


class Record:
    """A frozen dataclass with a JSON round trip. Its fields are plain values, tuples, dictionaries, other records, and
    value types, which have `parse` and are written as their text."""

    def to_dict(self) -> dict[str, Any]:
        return {f.name: _encode(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises `TypeError` for a value that is not of its field's type: what reads a record may rely on them."""
        hints = typing.get_type_hints(cls)
        for name in data:
            if name not in hints:
                raise unknown(f"field of {cls.__name__}", name, [f.name for f in dataclasses.fields(cls)])
        return cls(**{name: _decode(hints[name], value, f"{cls.__name__}.{name}") for name, value in data.items()})

    def to_json(self) -> str:
        return json.dumps({"schema_version": SCHEMA_VERSION, **self.to_dict()}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        data = json.loads(text)
        version = data.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ValueError(f"This {cls.__name__} has schema version {version}; this release reads {SCHEMA_VERSION}.")
        return cls.from_dict(data)


def _encode(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if hasattr(value, "parse"):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_encode(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value  # numpy numbers and arrays


def _decode(kind: Any, value: Any, field: str) -> Any:
    """The value of a field from what stood in JSON; `TypeError` for a plain value of another type than the field's."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _decode(next(a for a in arguments if a is not type(None)), value, field)
    if origin is tuple:
        _check(list, value, field)
        items = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_decode(item, v, field) for item, v in zip(items, value, strict=True))
    if origin is dict:
        _check(dict, value, field)
        return {key: _decode(arguments[1], item, field) for key, item in value.items()}
    if isinstance(kind, type) and issubclass(kind, Record):
        _check(dict, value, field)
        return kind.from_dict(value)
    if hasattr(kind, "parse"):
        return kind.parse(value)
    if kind in (bool, int, float, str):
        _check(kind, value, field)
    return value


def _check(kind: type, value: Any, field: str) -> None:
    allowed = {float: (float, int), list: (list, tuple)}.get(kind, kind)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{field} must be of type {kind.__name__}, and is of type {type(value).__name__}.")
