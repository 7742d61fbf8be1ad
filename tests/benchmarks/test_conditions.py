"""What is told about the machine, on a /proc and a clock made up for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sleb.benchmarks import conditions
from sleb.benchmarks.conditions import (
    ConditionsWatch,
    Pace,
    clock_notices,
    describe_clock,
    read_card_megahertz,
    read_megahertz,
)

CPU = torch.device("cpu")


class FixedPace(Pace):
    """Paces from a list."""

    def __init__(self, paces: list[float]) -> None:
        self._left = iter(paces)

    def measure(self) -> float:
        return next(self._left)


class Machine:
    """A /proc whose ticks `pass_ticks` moves on."""

    def __init__(self, proc: Path) -> None:
        self.proc, self.busy, self.total, self.own = proc, 1000, 10_000, 100
        (proc / str(os.getpid())).mkdir(parents=True)
        self._write()

    def pass_ticks(self, total: int, own: int, others: int) -> None:
        self.total += total
        self.busy += own + others
        self.own += own
        self._write()

    def _write(self) -> None:
        (self.proc / "stat").write_text(f"cpu  {self.busy} 0 0 {self.total - self.busy} 0 0 0 0 0 0\n")
        middle = " ".join(["0"] * 9)
        stat = f"{os.getpid()} (python) R 1 {middle} {self.own} 0 0 0 20 0\n"
        (self.proc / str(os.getpid()) / "stat").write_text(stat)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "proc")


@pytest.fixture(autouse=True)
def no_cpufreq(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(conditions, "CPUFREQ", tmp_path / "cpufreq")


def watch_runs(machine: Machine, others: list[int], paces: list[float]) -> dict[str, Any]:
    """Repetitions of two runs of 100 ticks; `others`: the ticks that others take in each run."""
    watch = ConditionsWatch(CPU, FixedPace(paces), machine.proc)
    for number in range(len(others) // 2):
        watch.begin_repetition("prompt 1 × 8", number + 1)
        for taken in others[2 * number : 2 * number + 2]:
            with watch.run():
                machine.pass_ticks(100, 60, taken)
    return watch.summary()


def test_a_quiet_machine_with_a_steady_clock_gives_no_notice(machine: Machine) -> None:
    found = watch_runs(machine, [0, 1, 2, 0, 0, 0], [100.0, 101.0, 99.0])
    assert found["notices"] == []
    assert found["others_share"] == {"median": pytest.approx(0.005), "high": pytest.approx(0.01)}
    assert (found["clock"]["unit"], found["clock"]["median"]) == ("relative", 1.0)
    assert [each["others_share"] for each in found["repetitions"]] == pytest.approx([0.005, 0.01, 0.0])
    assert found["repetitions"][1]["run_shares"] == pytest.approx([0.02, 0.0])


def test_what_others_took_is_told_by_runs(machine: Machine) -> None:
    found = watch_runs(machine, [0, 31, 12, 0, 7, 20], [1.0] * 3)
    assert found["notices"] == [
        "Other processes took up to 31% of the processors in 4 of 6 runs. End them, or measure when the machine is "
        "idle. On a virtual machine it may be the hypervisor, at work for others."
    ]
    assert [each["num_disturbed"] for each in found["repetitions"]] == [1, 1, 2]


def test_a_few_ticks_of_a_short_run_are_the_grain_of_the_clock(machine: Machine) -> None:
    watch = ConditionsWatch(CPU, FixedPace([1.0]), machine.proc)
    watch.begin_repetition("w", 1)
    with watch.run():
        machine.pass_ticks(6, 3, 3)
    assert watch.summary()["notices"] == []


def test_between_runs_nobody_is_counted(machine: Machine) -> None:
    watch = ConditionsWatch(CPU, FixedPace([1.0]), machine.proc)
    watch.begin_repetition("w", 1)
    for _ in range(2):
        machine.pass_ticks(100, 0, 90)
        with watch.run():
            machine.pass_ticks(100, 50, 0)
    assert watch.summary()["others_share"] == {"median": 0.0, "high": 0.0}


def test_a_pace_that_changes_is_told(machine: Machine) -> None:
    found = watch_runs(machine, [0] * 16, [100.0] * 4 + [112.0] * 4)
    [notice] = found["notices"]
    assert notice.startswith(
        "The processor's pace changed by 11% during the run (0.94 to 1.06 of its median)."
    )
    assert found["clock"]["drift"] == pytest.approx(12 / 106)


def test_one_interrupted_look_is_no_change_of_pace(machine: Machine) -> None:
    assert watch_runs(machine, [0] * 16, [100.0] * 4 + [50.0] + [100.0] * 3)["notices"] == []


def test_megahertz_are_told_where_they_move(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([3000.0, 3000.0, 3000.0, 2400.0, 2400.0, 2400.0])
    monkeypatch.setattr(conditions, "read_megahertz", lambda *folders: next(values))
    found = watch_runs(machine, [0] * 12, [100.0] * 6)
    assert (found["clock"]["unit"], found["clock"]["low"], found["clock"]["high"]) == ("MHz", 2400.0, 3000.0)
    assert found["notices"][0].startswith(
        "The processor's clock changed by 22% during the run (2,400 to 3,000 MHz)"
    )


def test_a_constant_clock_does_not_hide_the_pace(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a virtual machine tells."""
    monkeypatch.setattr(conditions, "read_megahertz", lambda *folders: 2596.146)
    found = watch_runs(machine, [0] * 16, [100.0] * 4 + [80.0] * 4)
    assert found["clock"]["unit"] == "relative" and len(found["notices"]) == 1


def test_megahertz_are_those_of_the_fastest_processor(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(
        "processor : 0\ncpu MHz\t\t: 800.5\n\nprocessor : 1\ncpu MHz\t\t: 3100.0\n"
    )
    assert read_megahertz(tmp_path, tmp_path) == 3100.0
    for number, kilohertz in enumerate((1_200_000, 2_500_000)):
        (tmp_path / f"cpu{number}" / "cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{number}" / "cpufreq" / "scaling_cur_freq").write_text(f"{kilohertz}\n")
    assert read_megahertz(tmp_path, tmp_path) == 2500.0
    assert read_megahertz(tmp_path / "none", tmp_path / "none") is None


def test_without_proc_the_share_is_unknown(tmp_path: Path) -> None:
    watch = ConditionsWatch(CPU, FixedPace([1.0]), tmp_path / "none")
    watch.begin_repetition("w", 1)
    with watch.run():
        pass
    assert watch.summary()["others_share"] is None
    assert ConditionsWatch(CPU, FixedPace([]), tmp_path).summary()["clock"] is None


def test_a_card_whose_clock_cannot_be_read_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: torch.device) -> int:
        raise ModuleNotFoundError("pynvml does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "clock_rate", missing)
    assert read_card_megahertz(torch.device("cuda", 0)) is None
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda device: 1980)
    assert read_card_megahertz(torch.device("cuda", 0)) == 1980.0
    assert read_card_megahertz(CPU) is None


def scripted_clock(cost: Callable[[], float], monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """A clock that a round of hashing moves on by cost()."""
    now = 0.0

    def hashed(rounds: int) -> None:
        nonlocal now
        now += rounds * cost()

    monkeypatch.setattr(conditions, "_hash", hashed)
    return lambda: now


def test_the_pace_is_of_a_fixed_piece_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that gets 12 % slower has a pace that is 1 / 1.12; one slow piece of three changes nothing."""
    seconds, spells = 1e-5, iter([1.0])
    clock = scripted_clock(lambda: seconds * next(spells, 1.0), monkeypatch)
    pace = Pace(clock)
    before = pace.measure()
    assert 1.5e-3 <= 1 / before < 3e-3
    seconds *= 1.12
    assert pace.measure() == pytest.approx(before / 1.12)
    spells = iter([1.0, 5.0, 1.0])
    assert pace.measure() == pytest.approx(before / 1.12)


def test_an_interruption_does_not_settle_the_size_of_the_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first piece takes a hundred times as long as it should."""
    spells = iter([100.0])
    pace = Pace(scripted_clock(lambda: 1e-5 * next(spells, 1.0), monkeypatch))
    assert 1.5e-3 <= 1 / pace.measure() < 3e-3


def test_a_look_at_the_real_pace_takes_milliseconds() -> None:
    pace = Pace()
    paces = [pace.measure() for _ in range(5)]
    assert 20 < max(paces) < 2000


def test_a_short_run_can_drift() -> None:
    """Of two or three looks there is one median of three at most, which would show no drift whatever happened."""
    for looks in ([0.83, 1.17], [0.83, 1.0, 1.17]):
        found = describe_clock("relative", looks, "processor")
        assert (found["low"], found["high"], found["drift"]) == (0.83, 1.17, pytest.approx(0.34))
        assert "changed by 34% during the run (0.83 to 1.17" in clock_notices(found)[0]
    assert describe_clock("relative", [1.0, 0.5, 1.0, 1.0], "processor")["drift"] == 0.0


def test_of_a_single_look_no_clock_is_told(machine: Machine) -> None:
    assert watch_runs(machine, [0, 0], [100.0])["clock"] is None
    assert watch_runs(machine, [0] * 4, [100.0, 141.0])["clock"]["drift"] == pytest.approx(82 / 241)


def test_a_run_between_two_ticks_tells_nothing_of_others(machine: Machine) -> None:
    watch = ConditionsWatch(CPU, FixedPace([1.0, 1.0]), machine.proc)
    watch.begin_repetition("w", 1)
    with watch.run():
        pass
    assert watch.summary()["others_share"] is None
    assert watch.repetitions[0].run_shares == []
    with watch.run():
        machine.pass_ticks(10, 5, 5)
    assert watch.repetitions[0].others_share == 0.5


def test_a_steady_clock_of_three_looks() -> None:
    assert clock_notices(describe_clock("MHz", [1000.0, 1000.0, 1000.0], "card")) == []
