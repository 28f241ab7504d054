# SPDX-License-Identifier: Apache-2.0
"""Tells metrics of the same name apart: by a fingerprint over what they do, where that can be told."""

from __future__ import annotations

import dis
import hashlib
import re
import sys
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .metrics import Metric


def fingerprint_of(metric: Metric) -> str | None:
    """SHA-256 over what decides a metric's results; None where that cannot be told, and no result may be taken for its own.

    Of a function: its code with its defaults and all that it refers to, which must be plain values, functions of the same
    kind, the standard library, or modules that say their version. Of what `evaluate.load` returns: name, configuration and
    the hash of its files. Objects of other classes hold what cannot be seen.
    """
    try:
        told = _of_module(metric) if hasattr(metric, "compute") else _told(metric, frozenset())
    except _CannotBeTold:
        return None
    return hashlib.sha256(repr(told).encode()).hexdigest()


class _CannotBeTold(Exception):
    """A function refers to something that may be anything."""


def _of_module(metric: Any) -> list[str]:
    if getattr(metric, "_hash", None) is None:  # which `evaluate.load` sets, to that of the files
        raise _CannotBeTold
    return [metric.name, str(metric.config_name), metric._hash]


def _told(value: Any, above: frozenset[int]) -> Any:
    """The value as strings in lists, the same ones in every process. `above` are the functions that lead to it."""
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return repr(value)
    if type(value) in (list, tuple):
        return [type(value).__name__, *(_told(item, above) for item in value)]
    if type(value) in (set, frozenset):
        return [type(value).__name__, *sorted((_told(item, above) for item in value), key=repr)]
    if type(value) is dict:
        return ["dict", *sorted(([_told(key, above), _told(item, above)] for key, item in value.items()), key=repr)]
    if isinstance(value, re.Pattern):
        return ["pattern", repr(value.pattern), value.flags]
    if isinstance(value, ModuleType):
        return ["module", value.__name__, _version(value)]
    if isinstance(value, type | BuiltinFunctionType | FunctionType) and _standard(value.__module__):
        return [value.__module__, value.__qualname__]
    if isinstance(value, FunctionType):
        return value.__qualname__ if id(value) in above else _of_function(value, above | {id(value)})
    raise _CannotBeTold


def _of_function(function: FunctionType, above: frozenset[int]) -> list[Any]:
    codes = [function.__code__]
    for code in codes:  # grows by the functions within
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    used = {name for code in codes for name in code.co_names} & function.__globals__.keys()
    imported = {step.argval for code in codes for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME"}
    try:
        closure = [cell.cell_contents for cell in function.__closure__ or ()]
        modules = [sys.modules[name] for name in sorted(imported) if not _standard(name)]
    except (ValueError, KeyError) as error:  # a variable without a value yet, a module that is not loaded yet
        raise _CannotBeTold from error
    referred = [function.__defaults__, function.__kwdefaults__, closure, modules]
    referred += [{name: function.__globals__[name] for name in used}]
    return [*(_of_code(code, above) for code in codes), _told(referred, above)]


def _of_code(code: CodeType, above: frozenset[int]) -> list[Any]:
    constants = [constant for constant in code.co_consts if not isinstance(constant, CodeType)]
    arguments = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags]
    return [code.co_code.hex(), code.co_exceptiontable.hex(), code.co_names, arguments, _told(constants, above)]


def _standard(module: str | None) -> bool:
    return (module or "").partition(".")[0] in sys.stdlib_module_names


def _version(module: ModuleType) -> str:
    if _standard(module.__name__):
        return ""
    if not isinstance(getattr(module, "__version__", None), str):
        raise _CannotBeTold
    return module.__version__
