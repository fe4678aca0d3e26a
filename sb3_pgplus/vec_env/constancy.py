"""
Does a class add anything that changes to the class it derives from? Judged from its attributes and its bytecode.

Most wrappers only compute something from what passes through them, and have no state to store. This module finds those
for which that is certain enough: only their constructor stores anything anywhere, and what the constructor stores
cannot be changed. In doubt the answer is that something may change.
"""

from __future__ import annotations

import dis
import functools
import logging
import types
from collections.abc import Iterator
from enum import Enum
from typing import Any

import numpy as np
from gymnasium import spaces

_FIXED: tuple[type[Any], ...] = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    slice,
    type(None),
    type,
    np.generic,
    np.ndarray,
    np.dtype,
)
#: Spaces have random generators, which are stored with them; loggers keep nothing that is read.
_FIXED += (Enum, np.ufunc, spaces.Space, types.ModuleType, types.BuiltinFunctionType, logging.Logger)
#: Storing into a local variable is no change. Items may be those of a local array or dict: that cannot be told apart.
_STORES = frozenset({"STORE_ATTR", "DELETE_ATTR", "STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"})
_STORES |= {"STORE_GLOBAL", "DELETE_GLOBAL"}
#: Ways to store something without such an instruction.
_NAMES = frozenset({"setattr", "delattr", "__setattr__", "__dict__", "vars", "globals", "locals", "exec", "eval"})
_NAMES |= {"set_wrapper_attr", "set_attr", "copyto", "put", "putmask", "place", "fill", "setflags", "itemset", "out"}
_NAMES |= {"append", "extend", "insert", "update", "pop", "popleft", "appendleft", "setdefault", "clear", "add"}
#: Ways to store something in a constructor that do not tell its name.
_NAMELESS = frozenset({"setattr", "__setattr__", "__dict__", "vars"})
#: Bases that only note the constructor's arguments.
_NOTES = ("typing", "gymnasium.utils.record_constructor", "gymnasium.utils.ezpickle")
#: Members of classes that are not looked at.
_IGNORED = frozenset({"metadata", "_abc_impl", "__doc__", "__module__", "__dict__", "__weakref__", "__annotations__"})
_IGNORED |= {"__orig_bases__", "__parameters__", "__abstractmethods__", "__static_attributes__", "__firstlineno__"}


def first_change(thing: Any, base: type[Any]) -> str | None:
    """
    Look for something in an object that may change after its construction.

    :param thing: the object
    :param base: a class of it whose own attributes are not asked about
    :return: what it is, in words; None if there is nothing
    """
    for cls in type(thing).__mro__[: type(thing).__mro__.index(base)]:
        if cls in base.__mro__ or cls.__module__ in _NOTES:
            continue
        for name, member in vars(cls).items():
            found = None if name in _IGNORED else _change_in_member(thing, name, member)
            if found is not None:
                return f"{cls.__name__}.{name} {found}"
    return None


def change_in_function(function: Any) -> str | None:
    """
    Look for something that a function may change and read again.

    :param function: of any kind
    :return: what it is, in words; None if there is nothing
    """
    if isinstance(function, (type, np.ufunc, types.BuiltinFunctionType)):
        return None
    if isinstance(function, functools.partial):
        return _first(map(_change_in_value, (function.func, *function.args, *function.keywords.values())))
    if not isinstance(function, types.FunctionType):
        return f"is a {type(function).__name__}, not a function"
    return _first(_changes(function, set()))


def _change_in_member(thing: Any, name: str, member: Any) -> str | None:
    if isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    if isinstance(member, property):
        return _first(change_in_function(part) for part in (member.fget, member.fset, member.fdel) if part is not None)
    if not isinstance(member, types.FunctionType):
        return _change_in_value(member)
    return _first(_stored_by(member, thing)) if name == "__init__" else change_in_function(member)


def _stored_by(constructor: types.FunctionType, thing: Any) -> Iterator[str | None]:
    if found := _NAMELESS.intersection(constructor.__code__.co_names):
        yield f"uses {min(found)}"
    stored = {i.argval for i in dis.get_instructions(constructor) if i.opname == "STORE_ATTR"}
    for name in sorted(stored & vars(thing).keys() - _IGNORED):
        why = _change_in_value(vars(thing)[name])
        yield None if why is None else f"stores {name}, which {why}"


def _changes(function: types.FunctionType, seen: set[int]) -> Iterator[str | None]:
    seen.add(id(function))
    for code in _codes(function.__code__):
        for instruction in dis.get_instructions(code):
            # `+=` changes an array in place, which may be an attribute under another name.
            if instruction.opname in _STORES or (instruction.opname == "BINARY_OP" and "=" in instruction.argrepr):
                yield f"stores something in {code.co_name}()"
            if instruction.opname == "STORE_DEREF" and instruction.argval in code.co_freevars:
                yield f"stores {instruction.argval} in {code.co_name}()"
        if found := _NAMES.intersection(code.co_names):
            yield f"uses {min(found)} in {code.co_name}()"
        for name in code.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, types.FunctionType):
                if id(value) not in seen and value.__globals__ is function.__globals__:
                    yield from _changes(value, seen)
            elif (why := _change_in_value(value)) is not None:
                yield f"uses {name}, which {why}"
    held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    held += [cell.cell_contents for cell in function.__closure__ or () if not _is_empty(cell)]
    yield from map(_change_in_value, held)


def _change_in_value(value: Any) -> str | None:
    if isinstance(value, (tuple, frozenset)):
        return _first(map(_change_in_value, value))
    if isinstance(value, (types.FunctionType, functools.partial)):
        return change_in_function(value)
    return None if isinstance(value, _FIXED) else f"is a {type(value).__name__}"


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_empty(cell: Any) -> bool:
    try:
        return cell.cell_contents is None
    except ValueError:
        return True


def _first(findings: Any) -> str | None:
    return next((finding for finding in findings if finding is not None), None)
