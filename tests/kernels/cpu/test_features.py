"""The processor's features, read from what /proc/cpuinfo says on several machines."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from sleb.errors import ConfigError
from sleb.kernels.cpu import features
from sleb.kernels.cpu.features import LEVELS, CpuFeatures, cpu_features, isa_level, parse_cpuinfo

# Flags as these machines list them, the ones that have no bearing left out.
AVX512 = "fpu sse2 avx2 fma f16c avx512f avx512dq rdseed adx avx512cd avx512bw avx512vl"
CASCADE_LAKE = f"{AVX512} pku ospke avx512_vnni md_clear"
GENOA = f"{AVX512} avx512ifma sha_ni avx512_bf16 avx512vbmi avx512_vbmi2 avx512_vnni avx512_vpopcntdq"
SAPPHIRE_RAPIDS = f"{AVX512} avx_vnni avx512_bf16 avx512_vnni amx_bf16 avx512_fp16 amx_tile amx_int8"
ZEN3 = "fpu sse2 avx2 fma f16c rdseed adx sha_ni vaes vpclmulqdq"
ARM = """\
processor\t: {number}
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp sve svebf16 i8mm bf16
CPU implementer\t: 0x41
CPU part\t: 0xd4f
"""


def cpuinfo(model: str, flags: str, cores: list[tuple[int, int]]) -> str:
    """/proc/cpuinfo of hardware threads on the given (socket, core)s."""
    return "".join(
        f"processor\t: {number}\nvendor_id\t: GenuineIntel\nmodel name\t: {model}\nphysical id\t: {socket}\n"
        f"core id\t\t: {core}\nflags\t\t: {flags}\nvmx flags\t: vnmi amx_tile\npower management:\n\n"
        for number, (socket, core) in enumerate(cores)
    )


@pytest.mark.parametrize(
    ("flags", "level", "true"),
    [
        (SAPPHIRE_RAPIDS, "amx", {"avx512", "vnni", "bf16", "amx_bf16", "amx_int8"}),
        (GENOA, "avx512bf16", {"avx512", "vnni", "bf16"}),
        (CASCADE_LAKE, "avx512", {"avx512", "vnni"}),
        (AVX512, "none", {"avx512"}),  # Skylake-X: no VNNI
        (ZEN3, "none", set()),
        # A hypervisor may hide a part: the level is then the one whose every part is there.
        (SAPPHIRE_RAPIDS.replace("amx_tile", ""), "avx512bf16", {"avx512", "vnni", "bf16"}),
        (SAPPHIRE_RAPIDS.replace("avx512_bf16", ""), "avx512", {"avx512", "vnni", "amx_bf16", "amx_int8"}),
        (GENOA.replace("avx512vl", ""), "none", {"vnni", "bf16"}),
    ],
)
def test_flags(flags: str, level: str, true: set[str]) -> None:
    found = parse_cpuinfo(cpuinfo("Some Processor", flags, [(0, 0)]), "x86_64")
    assert {name for name, value in dataclasses.asdict(found).items() if value is True} == true
    assert found.level == level
    assert (found.arch, found.model) == ("x86_64", "Some Processor")


def test_arm_has_none_of_them() -> None:
    """Its "bf16" is another instruction set's."""
    found = parse_cpuinfo("\n".join(ARM.format(number=number) for number in range(4)), "aarch64")
    assert found == CpuFeatures(arch="aarch64", model="", num_cores=4)
    assert found.level == "none"


def test_cores_are_physical_and_those_allowed() -> None:
    two_sockets = [(socket, core) for socket in (0, 1) for core in (0, 1, 4)]
    text = cpuinfo("Xeon", CASCADE_LAKE, two_sockets * 2)  # two hardware threads a core
    assert parse_cpuinfo(text, "x86_64").num_cores == 6
    assert parse_cpuinfo(text, "x86_64", {0, 6}).num_cores == 1
    assert parse_cpuinfo(text, "x86_64", {0, 1, 3, 7}).num_cores == 3


@pytest.mark.parametrize("text", ["", "processor: x\n", "garbage", "processor 0: version = FF\n\nflags\n"])
def test_unreadable_text_says_nothing(text: str) -> None:
    found = parse_cpuinfo(text, "x86_64", {0, 1, 2})
    assert found == CpuFeatures(arch="x86_64", model="", num_cores=3)


def test_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu_features.cache_clear()
    assert 1 <= cpu_features().num_cores <= (os.cpu_count() or 1)
    cpu_features.cache_clear()
    monkeypatch.setattr(features, "CPUINFO", tmp_path / "missing")
    assert cpu_features().level == "none"
    cpu_features.cache_clear()


@pytest.mark.parametrize("flags", [SAPPHIRE_RAPIDS, GENOA, CASCADE_LAKE, ZEN3])
@pytest.mark.parametrize("ceiling", LEVELS)
def test_the_variable_lowers_the_level(flags: str, ceiling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = parse_cpuinfo(cpuinfo("x", flags, [(0, 0)]), "x86_64")
    monkeypatch.setenv("SLEB_CPU_ISA", ceiling)
    assert LEVELS.index(isa_level(found)) == min(LEVELS.index(found.level), LEVELS.index(ceiling))
    monkeypatch.setenv("SLEB_CPU_ISA", "")
    assert isa_level(found) == found.level


def test_the_variable_names_its_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLEB_CPU_ISA", "avx2")
    with pytest.raises(
        ConfigError, match="SLEB_CPU_ISA is 'avx2'; choose one of: amx, avx512bf16, avx512, none"
    ):
        isa_level()
