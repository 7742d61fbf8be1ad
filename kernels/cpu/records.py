"""The structs, constants and functions of src/sleb_cpu.h, read from the header, which alone says what they are.

The header read is the one that the library was compiled with, since a library with another key is never loaded
(build.py). What the few rules here do not cover is an error at import, not a guess.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sleb.kernels.cpu.build import SOURCES

_SCALARS: dict[str, Any] = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "size_t": ctypes.c_size_t,
    "float": ctypes.c_float,
}
_NOT_CODE = re.compile(r"/\*.*?\*/|^[ \t]*#.*?$", re.DOTALL | re.MULTILINE)
_STATEMENT = re.compile(
    r"enum \{ (?P<constants>[^}]*) \} ;"
    r"|typedef struct \{ (?P<fields>[^}]*) ; \} (?P<struct>\w+) ;"
    r"|typedef struct (?P<opaque>\w+) (?P=opaque) ;"
    r"|SLEB_EXPORT (?P<result>[\w ]+(?: \*)?) (?P<function>\w+) \( (?P<parameters>[^)]*) \) ;"
)
_FUNCTION_POINTER = re.compile(r"(?P<result>\w+) \( \* (?P<name>\w+) \) \( (?P<parameters>[^)]*) \)")
_DECLARATION = re.compile(r"(?:const )?(?P<type>\w+) (?P<names>(?:\* )?\w+(?: , (?:\* )?\w+)*)")
_PARAMETER = re.compile(r"(?:const )?(?P<type>\w+)(?P<pointer> \*)?(?: \w+)?")


class Linear(ctypes.Structure):
    """sleb_linear"""


class Norm(ctypes.Structure):
    """sleb_norm"""


class Experts(ctypes.Structure):
    """sleb_experts"""


class Unit(ctypes.Structure):
    """sleb_unit"""


class Model(ctypes.Structure):
    """sleb_model"""


class Step(ctypes.Structure):
    """sleb_step"""


class Sample(ctypes.Structure):
    """sleb_sample"""


class Isa(ctypes.Structure):
    """sleb_isa"""


@dataclass
class Header:
    """What a header declares. `records`: for each struct the class that stands for it, without fields so far.

    Raises ValueError for a declaration that it does not understand, and for a struct without a class or the reverse.
    """

    text: str
    records: Mapping[str, type[ctypes.Structure]]
    constants: dict[str, int] = field(default_factory=dict)
    functions: dict[str, tuple[Any, list[Any]]] = field(default_factory=dict)  # name: result, arguments

    def __post_init__(self) -> None:
        code = " ".join(re.findall(r"\w+|[^\w\s]", _NOT_CODE.sub(" ", self.text)))
        at, structs = 0, set()
        while at < len(code):
            found = _STATEMENT.match(code, at)
            if found is None:
                raise ValueError(f"a header may not declare: {code[at : at + 80]}")
            at = found.end() + 1
            if found["constants"]:
                self._read_constants(found["constants"])
            elif found["function"]:
                arguments = self._arguments(found["parameters"])
                self.functions[found["function"]] = (self._argument(found["result"]), arguments)
            elif name := found["struct"]:
                structs.add(name)
                if name not in self.records:
                    raise ValueError(f"no record stands for the struct {name}")
                self.records[name]._fields_ = self._fields(found["fields"])
        if missing := self.records.keys() - structs:
            raise ValueError(f"the header has no struct {', '.join(sorted(missing))}")

    def _read_constants(self, code: str) -> None:
        value = -1
        for item in code.split(" , "):
            name, _, number = item.partition(" = ")
            value = int(number) if number else value + 1
            self.constants[name] = value

    def _fields(self, code: str) -> list[tuple[str, Any]]:
        fields: list[tuple[str, Any]] = []
        for declaration in code.split(" ; "):
            if found := _FUNCTION_POINTER.fullmatch(declaration):
                result, arguments = self._argument(found["result"]), self._arguments(found["parameters"])
                fields.append((found["name"], ctypes.CFUNCTYPE(result, *arguments)))
            elif found := _DECLARATION.fullmatch(declaration):
                for name in found["names"].split(" , "):
                    of = ctypes.c_void_p if name.startswith("* ") else self._value(found["type"])
                    fields.append((name.removeprefix("* "), of))
            else:
                raise ValueError(f"a struct may not hold: {declaration}")
        return fields

    def _value(self, name: str) -> Any:
        if name not in _SCALARS and name not in self.records:
            raise ValueError(f"a type that no rule covers: {name}")
        return _SCALARS.get(name) or self.records[name]

    def _arguments(self, code: str) -> list[Any]:
        return [] if code == "void" else [self._argument(each) for each in code.split(" , ")]

    def _argument(self, code: str) -> Any:
        found = _PARAMETER.fullmatch(code)
        if found is None:
            raise ValueError(f"a function may not take or return: {code}")
        name = found["type"]
        if found["pointer"] is None:
            return None if name == "void" else self._value(name)
        if name == "char":
            return ctypes.c_char_p
        # Pointers to records take a record or its address; of others Python knows only the address.
        pointee = self.records.get(name) or (ctypes.c_size_t if name == "size_t" else None)
        return ctypes.POINTER(pointee) if pointee else ctypes.c_void_p


_ALL: tuple[type[ctypes.Structure], ...] = (Linear, Norm, Experts, Unit, Model, Step, Sample, Isa)
HEADER = Header(
    (SOURCES / "sleb_cpu.h").read_text(encoding="utf-8"),
    {f"sleb_{record.__name__.lower()}": record for record in _ALL},
)
