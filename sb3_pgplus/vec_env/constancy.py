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
import sys
import types
from collections.abc import Iterator
from enum import Enum
from typing import Any

import numpy as np
from gymnasium import spaces

#: Packages whose functions, classes and modules keep nothing, as far as wrappers use them.
_TRUSTED = frozenset({"numpy", "gymnasium", "stable_baselines3", "sb3_pgplus", "builtins"}) | sys.stdlib_module_names
_FIXED: tuple[type[Any], ...] = (bool, int, float, complex, str, bytes, range, slice, type(None), np.generic, np.dtype)
#: Spaces have random generators, which are stored with them; loggers keep nothing that is read.
_FIXED += (Enum, spaces.Space, logging.Logger)
#: Storing into a local variable is no change. Items may be those of a local array or dict: that cannot be told apart.
_STORES = frozenset({"STORE_ATTR", "DELETE_ATTR", "STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"})
_STORES |= {"STORE_GLOBAL", "DELETE_GLOBAL"}
#: Ways to store something without such an instruction.
_NAMES = frozenset({"setattr", "delattr", "__setattr__", "__dict__", "vars", "globals", "locals", "exec", "eval"})
_NAMES |= {"set_wrapper_attr", "set_attr", "copyto", "put", "putmask", "place", "fill", "setflags", "itemset", "out"}
_NAMES |= {"append", "extend", "insert", "update", "pop", "popleft", "appendleft", "setdefault", "clear", "add"}
#: Ways to come at an attribute without its name, at code that is not known here, or at the constructor.
_NAMES |= {"getattr", "__getattribute__", "attrgetter", "methodcaller", "get_wrapper_attr", "get_attr", "env_method"}
_NAMES |= {"import_module", "__import__", "__init__", "__setstate__"}
#: What may be asked of an array without getting at its memory; `astype` with one argument copies.
_HARMLESS = frozenset({"astype", "dtype", "ndim", "shape", "size"})
_LOADS_ATTRIBUTE = frozenset({"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"})
_LOADS_LOCAL = frozenset({"LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_CONST"})
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
    return _Judge(thing, base).of_thing()


def change_in_function(function: Any) -> str | None:
    """
    Look for something that a function may change and read again.

    :param function: of any kind
    :return: what it is, in words; None if there is nothing
    """
    return _Judge().of_value(function)


class _Judge:
    """
    Looks through an object, or a function alone, and remembers where it has been.

    :param thing: the object, if any
    :param base: a class of it whose own attributes are not asked about
    """

    def __init__(self, thing: Any = None, base: type[Any] = object) -> None:
        self.thing = thing
        self.seen: set[int] = set()
        ancestors = type(thing).__mro__
        self.classes = [cls for cls in ancestors if cls not in base.__mro__ and cls.__module__ not in _NOTES]
        if thing is None:
            self.classes = []
        # The base answers for the attributes that it stores, unless a constructor here stores them anew.
        of_base = {name for cls in ancestors if cls not in self.classes for name in _names_stored_in(cls)}
        held = getattr(thing, "__dict__", {})
        anew = {name for cls in self.classes for name in _names_stored_by(vars(cls).get("__init__"))}
        self.own = {name: held[name] for name in held if (name in anew or name not in of_base) and name not in _IGNORED}
        members = [*self.own.items(), *(item for cls in self.classes for item in vars(cls).items())]
        self.arrays = {name for name, value in members if isinstance(value, np.ndarray)}

    def of_thing(self) -> str | None:
        """The first change in the object."""
        for cls in self.classes:
            for name, member in vars(cls).items():
                found = None if name in _IGNORED else self._of_member(name, member)
                if found is not None:
                    return f"{cls.__name__}.{name} {found}"
        for name, value in self.own.items():
            if (why := self.of_value(value, array=True)) is not None:
                return f"{type(self.thing).__name__} has {name}, which {why}"
        return None

    def of_value(self, value: Any, array: bool = False) -> str | None:
        """
        The first change in something that is kept.

        :param value: what is kept
        :param array: whether it may be an array: each use of it is looked at
        :return: what it is, in words; None if there is nothing
        """
        if isinstance(value, tuple | frozenset) and type(value) in (tuple, frozenset):
            return _first(map(self.of_value, value))
        if isinstance(value, types.FunctionType):
            return _first(self._of_function(value))
        if isinstance(value, functools.partial):
            return _first(map(self.of_value, (value.func, *value.args, *value.keywords.values())))
        if isinstance(value, np.ufunc):
            fixed = getattr(np, value.__name__, None) is value
        elif isinstance(value, types.BuiltinFunctionType):
            of_module = value.__self__ is None or isinstance(value.__self__, types.ModuleType)
            fixed = of_module and _is_trusted(value.__module__)
        elif isinstance(value, types.ModuleType):
            fixed = _is_trusted(value.__name__)
        elif isinstance(value, type):
            fixed = _is_trusted(value.__module__) or value in self.classes
        elif isinstance(value, np.ndarray):
            fixed = array and type(value) is np.ndarray and not value.dtype.hasobject
        else:
            fixed = isinstance(value, _FIXED) and _is_trusted(type(value).__module__) and not isinstance(value, np.void)
        return None if fixed else f"is a {type(value).__name__}"

    def _of_member(self, name: str, member: Any) -> str | None:
        if isinstance(member, (staticmethod, classmethod)):
            member = member.__func__
        if isinstance(member, property):
            return _first(self.of_value(part) for part in (member.fget, member.fset, member.fdel))
        if name == "__init__" and isinstance(member, types.FunctionType):
            return _first(self._of_constructor(member))
        return self.of_value(member, array=True)

    def _of_constructor(self, constructor: types.FunctionType) -> Iterator[str | None]:
        if found := _NAMELESS.intersection(constructor.__code__.co_names):
            yield f"uses {min(found)}"
        for name in sorted(_names_stored_by(constructor) & self.own.keys()):
            why = self.of_value(self.own[name], array=True)
            yield None if why is None else f"stores {name}, which {why}"

    def _of_function(self, function: types.FunctionType) -> Iterator[str | None]:
        if id(function) in self.seen:
            return
        self.seen.add(id(function))
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        closure = {name: cell.cell_contents for name, cell in cells.items() if not _is_empty(cell)}
        for code in _codes(function.__code__):
            yield from self._of_code(code, function.__globals__, closure)
        held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values()]
        yield from map(self.of_value, held)
        yield from (self.of_value(value, array=True) for value in closure.values())

    def _of_code(self, code: types.CodeType, names: dict[str, Any], closure: dict[str, Any]) -> Iterator[str | None]:
        instructions = list(dis.get_instructions(code))
        changed = []
        for index, instruction in enumerate(instructions):
            opname, name = instruction.opname, instruction.argval
            # `+=` changes an array in place, which may be an attribute under another name.
            if opname in _STORES or (opname == "BINARY_OP" and "=" in instruction.argrepr):
                yield f"stores something in {code.co_name}()"
            if opname == "STORE_DEREF" and name in code.co_freevars:
                yield f"stores {name} in {code.co_name}()"
            if opname == "IMPORT_NAME":
                yield f"imports {name} in {code.co_name}()"
            is_array = opname in _LOADS_ATTRIBUTE and name in self.arrays
            # What a closure holds is looked at anyway.
            if opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF"):
                value = names.get(name) if opname in ("LOAD_GLOBAL", "LOAD_NAME") else closure.get(name)
                is_array = isinstance(value, np.ndarray)
                is_global = opname in ("LOAD_GLOBAL", "LOAD_NAME") and not self._is_foreign(value, names)
                if is_global and (why := self.of_value(value, array=True)) is not None:
                    yield f"uses {name}, which {why}"
            if is_array and not _only_computes(instructions[index + 1 :]):
                changed.append(f"may change {name} in {code.co_name}()")
        # The names of keywords are in tuples.
        keywords = {name for names in code.co_consts if isinstance(names, tuple) for name in names if type(name) is str}
        if found := _NAMES.intersection(code.co_names) | (_NAMES | self.arrays) & keywords:
            yield f"uses {min(found)} in {code.co_name}()"
        yield from changed

    def _is_foreign(self, value: Any, names: dict[str, Any]) -> bool:
        """Whether it is a function of a trusted package that is not the one being judged, and holds no other code."""
        if not isinstance(value, types.FunctionType) or value.__globals__ is names:
            return False
        return value.__closure__ is None and _is_trusted(value.__globals__.get("__name__"))


def _is_trusted(module: Any) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in _TRUSTED


def _only_computes(rest: list[dis.Instruction]) -> bool:
    """Whether the instructions after the load of an array make something new of it."""
    if rest[0].opname in _LOADS_ATTRIBUTE and rest[0].argval in _HARMLESS:
        call = next((i for i in rest if i.opname.startswith("CALL")), None)
        return rest[0].argval != "astype" or (call is not None and call.opname == "CALL" and call.argval == 1)
    use = rest[1] if rest[0].opname in _LOADS_LOCAL else rest[0]
    return use.opname == "COMPARE_OP" or (use.opname == "BINARY_OP" and not set("=[") & set(use.argrepr))


def _names_stored_in(cls: type[Any]) -> set[str]:
    return {name for member in vars(cls).values() for name in _names_stored_by(member)}


def _names_stored_by(function: Any) -> set[str]:
    if isinstance(function, property):
        function = function.fset
    if not isinstance(function, types.FunctionType):
        return set()
    return {i.argval for i in dis.get_instructions(function) if i.opname == "STORE_ATTR"}


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
