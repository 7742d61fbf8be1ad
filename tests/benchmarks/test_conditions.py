"""What the machine was like meanwhile, on a /proc and a clock made up for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sleb.benchmarks.environment import Conditions, drift, pace, peak_memory, processes_under

CHILD = 700_001  # of this process, OTHER of none of ours
OTHER = 700_002


class Machine:
    """A /proc whose ticks `pass_ticks` moves on."""

    def __init__(self, proc: Path) -> None:
        self.proc, self.busy, self.total = proc, 1000, 10_000
        self.own = {os.getpid(): 100, CHILD: 10, OTHER: 500}
        self.pass_ticks(0, 0, 0)

    def pass_ticks(self, total: int, own: int, others: int, child: int = 0) -> None:
        self.total += total
        self.busy += own + child + others
        for pid, ticks in ((os.getpid(), own), (CHILD, child), (OTHER, others)):
            self.own[pid] += ticks
            folder = self.proc / str(pid)
            folder.mkdir(parents=True, exist_ok=True)
            parent = os.getpid() if pid == CHILD else 1
            middle = " ".join(["0"] * 9)
            stat = f"{pid} (a (name) x) R {parent} {middle} {self.own[pid]} 0 0 0 20 0\n"
            (folder / "stat").write_text(stat)
            (folder / "status").write_text("Name: x\nVmHWM:    2048 kB\n")
        idle = self.total - self.busy
        (self.proc / "stat").write_text(f"cpu  {self.busy} 0 0 {idle} 0 0 0 0 0 0\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "proc")


def watched(machine: Machine, others: list[int], paces: list[float]) -> Conditions:
    """Turns of two runs of 100 ticks; `others`: the ticks that others take in each run."""
    looks = iter(paces)
    conditions = Conditions(look=lambda: next(looks), proc=machine.proc)
    for place in range(0, len(others), 2):
        conditions.begin_turn()
        for taken in others[place : place + 2]:
            machine.pass_ticks(100, 0, 90)  # between runs nobody is counted
            with conditions.run():
                machine.pass_ticks(100, 40, taken, child=20)
    return conditions


def test_a_quiet_machine_with_a_steady_clock_gives_no_note(machine: Machine) -> None:
    found = watched(machine, [0, 1, 2, 0, 0, 0], [100.0, 101.0, 99.0])
    assert found.notes() == []
    assert found.summary() == {
        "others_share": {"median": 0.0, "high": pytest.approx(0.02)},
        "disturbed_runs": 0, "pace_drift": pytest.approx(0.02),
    }  # fmt: skip


def test_what_others_took_is_told_by_runs(machine: Machine) -> None:
    """A few ticks of a short run are the grain of the clock."""
    [note] = watched(machine, [0, 31, 12, 0, 6, 20], [1.0] * 3).notes()
    assert note.startswith("Other processes took up to 31% of the processors in 3 of 6 runs")


def test_a_pace_that_changes_is_told_and_one_interrupted_look_is_not(machine: Machine) -> None:
    found = watched(machine, [0] * 16, [100.0] * 4 + [112.0] * 4)
    assert found.notes()[0].startswith("The machine's pace changed by 11% during the run")
    assert watched(machine, [0] * 16, [100.0] * 4 + [50.0] + [100.0] * 3).notes() == []


def test_drift() -> None:
    """Of two or three looks there is one median of three at most, which would show nothing whatever happened."""
    assert drift([0.83, 1.17]) == drift([0.83, 1.0, 1.17]) == pytest.approx(0.34)
    assert drift([1.0, 0.5, 1.0, 1.0]) == 0.0
    assert drift([1.0]) is None and drift([]) is None


def test_without_proc_or_a_tick_the_share_is_unknown(machine: Machine, tmp_path: Path) -> None:
    for proc in (tmp_path / "none", machine.proc):
        conditions = Conditions(look=lambda: 1.0, proc=proc)
        conditions.begin_turn()
        with conditions.run():
            pass
        assert conditions.summary()["others_share"] is None and conditions.notes() == []


def test_processes_and_the_memory_of_a_tree(machine: Machine) -> None:
    assert processes_under([os.getpid()], machine.proc) == {os.getpid(): 100, CHILD: 10}
    assert peak_memory(os.getpid(), machine.proc) == 2 * 2048 * 1024
    assert processes_under([1], machine.proc / "none") == {}


def test_the_pace_is_that_of_the_best_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three pieces are interrupted."""
    times = iter([0.0, 9.0, 10.0, 10.002, 20.0, 25.0])
    monkeypatch.setattr("sleb.benchmarks.environment.time.perf_counter", lambda: next(times))
    assert pace() == pytest.approx(1 / 0.002)
