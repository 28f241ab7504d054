# SPDX-License-Identifier: Apache-2.0
"""Objects of a program, used by tests in another process; `supervisor.py` loads this file, which imports nothing of ours.

The tests ask and the program answers, one line of JSON each. What arrives at the tests is plain: numbers, text,
containers, a few values of the standard library, or a `Remote`, which stands for any other object of the program. So a
program can neither reach its tests nor hand them an object that equals everything: a `Remote` equals no plain value.
"""

import ast
import builtins
import collections
import importlib
import json
import operator
import os
import sys
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType


SEQUENCES = {kind.__name__: kind for kind in (list, tuple, set, frozenset, collections.deque)}
MADE = {  # values that are known by what they are made from
    *(("decimal", "Decimal"), ("fractions", "Fraction")),
    *(("datetime", name) for name in ("date", "datetime", "time", "timedelta")),
}
JSON_BITS = 64  # of whole numbers; longer ones, of which Python reads and writes no decimals, go as hexadecimals
Names = dict[str, object]


class Remote:
    """An object of the other process. Calls, attributes and operators are passed on; comparisons only where both sides
    are objects of the program, since it could answer them as it likes."""

    __slots__ = ("_number", "_peer")

    def __init__(self, peer: "Peer", number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._peer.ask(self, args, kwargs)

    def __getattr__(self, name: str) -> object:
        return self._peer.ask("getattr", (self, name))

    def __setattr__(self, name: str, value: object) -> None:
        self._peer.ask("setattr", (self, name, value))


def _passed_on(name: str) -> Callable:
    return lambda self, *args: self._peer.ask(name, (self, *args))


def _compared(name: str) -> Callable:
    def compare(self: Remote, other: object) -> object:
        return self._peer.ask(name, (self, other)) if isinstance(other, Remote) else NotImplemented

    return compare


for _name in (
    *("len", "iter", "next", "bool", "str", "repr", "hash", "int", "float", "abs", "round", "neg", "index"),
    *("getitem", "setitem", "delitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow"),
):
    setattr(Remote, f"__{_name}__", _passed_on(_name))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Remote, f"__{_name}__", _compared(_name))


class Peer:
    """One of the two sides. The side of the program has its names and does whatever it is asked; the side of the tests
    calls nothing but the functions that the tests have handed over."""

    def __init__(self, descriptor: int, program: Names | None = None) -> None:
        self._descriptor, self._program = descriptor, program
        self._lines = os.fdopen(descriptor, "rb", closefd=False)
        self._kept: list[object] = []

    def ask(self, function: object, args: Sequence[object], kwargs: Names | None = None) -> object:
        """What the function returns, in the other process; raises what it raises there, as the built-in error of that
        name, and `EOFError` where the other process has ended."""
        self._send(["call", self._encoded(function), [*map(self._encoded, args)], self._encoded(kwargs or {})])
        while True:
            kind, *parts = self._receive()
            if kind == "call":
                self._answer(*parts)
            elif kind == "raised" and parts[0] == "StopIteration" and function != "next":
                raise RuntimeError("StopIteration")  # it would end a loop of the tests, and with it what they check
            elif kind == "raised":
                raise _error(*parts)
            else:
                value, changed = parts
                for position, new in changed:
                    _replace(args[position], self._decoded(new))
                return self._decoded(value)

    def serve(self) -> None:
        """Answer until the other side is gone."""
        while True:
            try:
                self._answer(*self._receive()[1:])
            except EOFError:
                return

    def tell(self, error: BaseException | None) -> None:
        """Let the other side's `wait` end: raising `error` there, or well."""
        self._send(["raised", type(error).__name__, _text(error)] if error is not None else ["returned", None, []])

    def wait(self) -> None:
        kind, *parts = self._receive()
        if kind == "raised":
            raise _error(*parts)

    def _answer(self, function: object, args: Sequence[object], kwargs: object) -> None:
        try:
            called, given = self._function(function), [*map(self._decoded, args)]
            returned = called(*given, **self._decoded(kwargs))
            changed = [
                [i, new]
                for i, (value, before) in enumerate(zip(given, args, strict=True))
                if type(value) in (list, dict, set, bytearray) and (new := self._encoded(value)) != before
            ]
            answer = ["returned", self._encoded(returned), changed]
        except BaseException as error:
            answer = ["raised", type(error).__name__, _text(error)]
        self._send(answer)

    def _function(self, asked: object) -> Callable:
        if self._program is None:
            found = self._decoded(asked)
            if any(found is function for function in self._kept):
                return found
            raise PermissionError("only functions that the tests have handed over are called here")
        if asked == "names":
            return lambda wanted: {name: self._program[name] for name in wanted if name in self._program}
        if isinstance(asked, str):
            return getattr(builtins, asked, None) or getattr(operator, asked)
        return self._decoded(asked)

    def _encoded(self, value: object) -> object:
        if value is None or isinstance(value, bool | float | str):
            return value
        if isinstance(value, int):
            return value if value.bit_length() <= JSON_BITS else {"int": hex(value)}
        for name, kind in SEQUENCES.items():
            if isinstance(value, kind):
                return {name: [*map(self._encoded, kind.__iter__(value))]}
        if isinstance(value, dict):
            return {"dict": [[self._encoded(key), self._encoded(item)] for key, item in dict.items(value)]}
        if isinstance(value, bytes | bytearray):
            return {"bytes" if isinstance(value, bytes) else "bytearray": value.hex()}
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        if isinstance(value, range):
            return {"range": [value.start, value.stop, value.step]}
        if isinstance(value, slice):
            return {"slice": [self._encoded(part) for part in (value.start, value.stop, value.step)]}
        if isinstance(value, Remote):
            return {"yours": value._number}
        where = _place(value)
        if where is not None and (self._program is None or (where[0] == "builtins" and isinstance(value, type))):
            return {"library": where}
        module, name = type(value).__module__, type(value).__name__
        if (module, name) in MADE:
            return {"made": [module, name, self._encoded(value.__reduce__()[1])]}
        if self._program is None and not callable(value):
            raise TypeError(f"tests cannot hand the program a {name}; only values, functions and its own objects")
        self._kept.append(value)
        return {"mine": len(self._kept) - 1}

    def _decoded(self, data: object) -> object:
        if not isinstance(data, dict):
            return data
        ((kind, parts),) = data.items()
        if kind in SEQUENCES:
            return SEQUENCES[kind](map(self._decoded, parts))
        if kind == "dict":
            return {self._decoded(key): self._decoded(item) for key, item in parts}
        if kind == "mine":
            return Remote(self, parts)
        if kind == "yours":
            return self._kept[parts]
        if kind == "int":
            return int(parts, 16)
        if kind in ("bytes", "bytearray"):
            return getattr(builtins, kind).fromhex(parts)
        if kind in ("complex", "range", "slice"):
            return getattr(builtins, kind)(*map(self._decoded, parts))
        if kind == "library" and self._program is not None:
            return getattr(importlib.import_module(parts[0]), parts[1])
        if kind == "library" and parts[0] == "builtins" and isinstance(getattr(builtins, parts[1]), type):
            return getattr(builtins, parts[1])  # no more than a type: what a program names may equal everything
        if kind != "made" or tuple(parts[:2]) not in MADE:
            raise ValueError(f"a program sent {kind} {parts}"[:400])
        module, name, args = parts
        return getattr(importlib.import_module(module), name)(*self._decoded(args))

    def _send(self, message: object) -> None:
        line = memoryview(json.dumps(message).encode() + b"\n")
        while line:
            line = line[os.write(self._descriptor, line) :]

    def _receive(self) -> list:
        line = self._lines.readline()
        if not line:
            raise EOFError("the program ended before its tests did")
        return json.loads(line)


def names_for(tests: str, peer: Peer) -> Names:
    """The names of the program that its tests use.

    Built-in names stay what they are where the tests use any other name of the program, and so does a module of the
    standard library of which the tests use attributes alone: a program cannot redefine what its tests compare with.
    """
    nodes = list(ast.walk(ast.parse(tests)))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and not node.id.startswith("__")}
    bases = [node.value for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    places = {id(base) for base in bases}
    alone = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in places}
    modules = ({base.id for base in bases} - alone) & sys.stdlib_module_names
    answer = peer.ask("names", (sorted(used),))
    found = {name: answer[name] for name in used if name in answer}  # no more than was asked for
    real = {name: importlib.import_module(name) for name in modules & set(found)}
    others = {name: value for name, value in found.items() if not hasattr(builtins, name)}
    return (others or found) | real


def _place(value: object) -> list[str] | None:
    """Where the standard library has this class or function; None for everything else."""
    if not isinstance(value, type | FunctionType | BuiltinFunctionType):
        return None
    module, name = getattr(value, "__module__", None), value.__name__
    if not isinstance(module, str) or module.partition(".")[0] not in sys.stdlib_module_names or module == "__main__":
        return None
    return [module, name] if getattr(sys.modules.get(module), name, None) is value else None


def _replace(old: object, new: object) -> None:
    """Give a list, dictionary, set or bytearray of the tests what the program made of it."""
    if isinstance(old, list | bytearray):
        old[:] = new
    else:
        old.clear()
        old.update(new)


def _error(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # UnicodeDecodeError and its like take more
            pass
    return RuntimeError(f"{name}: {text}")


def _text(error: BaseException) -> str:
    return str(error)[:400]
