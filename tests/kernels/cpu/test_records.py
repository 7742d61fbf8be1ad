"""sleb_cpu.h as Python reads it: the compiler is the judge of layouts, and what the rules do not cover is refused."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from sleb.kernels.cpu import build
from sleb.kernels.cpu.records import HEADER, Header


def test_records_are_laid_out_as_the_compiler_does(tmp_path: Path) -> None:
    """Sizes, offsets and constants, printed by a program that includes the header."""
    compiler = build.find_compiler()
    if build.unsupported() is not None or compiler is None:
        pytest.skip("the CPU kernels are for x86-64 Linux with a C compiler")
    lines, expected = [], []
    for name, record in HEADER.records.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(record)}")
        for field, *_ in record._fields_:
            place = getattr(record, field)
            what = f"offsetof({name}, {field}), sizeof((({name} *)0)->{field})"
            lines.append(f'printf("{name}.{field} %zu %zu\\n", {what});')
            expected.append(f"{name}.{field} {place.offset} {place.size}")
    for name, value in HEADER.constants.items():
        lines.append(f'printf("{name} %d\\n", {name});')
        expected.append(f"{name} {value}")
    source = tmp_path / "layout.c"
    source.write_text(
        '#include <stdio.h>\n#include "sleb_cpu.h"\nint main(void) {' + "\n".join(lines) + "}\n"
    )
    subprocess.run(
        [*compiler, "-I", str(build.SOURCES), str(source), "-o", str(tmp_path / "layout")], check=True
    )
    printed = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == expected
    assert len(expected) > 80


def pair() -> dict[str, type[ctypes.Structure]]:
    return {"pair": type("Pair", (ctypes.Structure,), {})}


def test_a_header_in_small() -> None:
    text = """
    #ifndef X /* a guard */
    enum { A, B = 7, C };
    typedef struct opaque opaque;
    typedef struct {
        const float *x, *y; /* [n];
                               two lines */
        int32_t n;
        int32_t (*call)(const opaque *, int64_t count);
    } pair;
    SLEB_EXPORT void *make(const pair *from, const char *name, size_t *bytes);
    SLEB_EXPORT void stop(void);
    #endif
    """
    header = Header(text, pair())
    assert header.constants == {"A": 0, "B": 7, "C": 8}
    record = header.records["pair"]
    assert [name for name, *_ in record._fields_] == ["x", "y", "n", "call"]
    assert ctypes.sizeof(record) == 32
    sizes = ctypes.POINTER(ctypes.c_size_t)
    made = (ctypes.c_void_p, [ctypes.POINTER(record), ctypes.c_char_p, sizes])
    assert header.functions == {"make": made, "stop": (None, [])}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("typedef union { int32_t a; } pair;", "may not declare: typedef union"),
        ("typedef struct { int32_t a[4]; } pair;", "may not hold: int32_t a"),
        ("typedef struct { int32_t a : 3; } pair;", "may not hold: int32_t a : 3"),
        ("typedef struct { long a; } pair;", "no rule covers: long"),
        ("typedef struct { unsigned int a; } pair;", "may not hold: unsigned int a"),
        ("typedef struct { int32_t a; } other;", "no record stands for the struct other"),
        ("typedef struct opaque opaque;", "has no struct pair"),
        ("SLEB_EXPORT void f(int32_t a[4]);", "may not take or return: int32_t a"),
        ("SLEB_EXPORT double f(void);", "no rule covers: double"),
        ("void f(void);", "may not declare: void f"),
        ("enum { A = B };", "invalid literal"),
    ],
)
def test_what_a_header_may_not_say(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Header(text, pair())
