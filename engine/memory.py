"""Memory: what this process may still take, and errors, in one line each, for more than that."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from sleb.errors import ModelError, SlebError

GIB = 1 << 30
_CONTROL_GROUP_FILES = {  # limit, usage, and pages of files in memory.stat; version 2, and 1
    "": ("memory.max", "memory.current", r"(?m)^(?:in)?active_file (\d+)$"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", r"(?m)^total_(?:in)?active_file (\d+)$"),
}


@dataclass(frozen=True)
class Free:
    """Bytes that can be taken, and what says so: "this machine", "the control group" …"""

    num_bytes: int
    of: str


def free_memory(device: torch.device, *, swap: bool = False, root: Path = Path("/")) -> Free:
    """What can be taken on `device`; on a CPU the least of what machine, control group and `ulimit -v` leave.

    swap: count the machine's swap space too. root: where /proc and /sys are.
    """
    if device.type == "cuda":
        return Free(torch.cuda.mem_get_info(device)[0], f"the GPU {device}")
    limits = [Free(_machine(root, swap), "this machine")]
    limits += [Free(each, "the control group (container)") for each in _control_groups(root)]
    with suppress(ImportError, OSError, ValueError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            pages = int((root / "proc/self/statm").read_text(encoding="ascii").split()[0])
            limits.append(Free(max(0, soft - pages * os.sysconf("SC_PAGE_SIZE")), "ulimit -v"))
    return min(limits, key=lambda each: each.num_bytes)


def check_fits(what: str, num_bytes: int, device: torch.device, remedy: str, error: type[SlebError]) -> None:
    """Raises `error` if `num_bytes` for `what` are more than `device` has free. Takes nothing."""
    free = free_memory(device, swap=True)
    if num_bytes > free.num_bytes:
        raise error(
            f"{what} {_gib(num_bytes)}, but {free.of} has {_gib(free.num_bytes)} of memory free: {remedy}"
        )


@contextmanager
def refusal_told(what: str, device: torch.device, remedy: str) -> Iterator[None]:
    """An allocation that the system refuses, within, is a ModelError of one line."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "can't allocate memory" not in str(
            error
        ):  # torch's words on a CPU
            raise
        free = free_memory(device)
        raise ModelError(
            f"the system gives no memory for {what}; {free.of} has {_gib(free.num_bytes)} free: {remedy}"
        ) from None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def _machine(root: Path, swap: bool) -> int:
    """Free memory as Linux estimates it; elsewhere half of what is there, or with swap all of it."""
    names = ("MemAvailable", "SwapFree") if swap else ("MemAvailable",)
    with suppress(OSError):
        text = (root / "proc/meminfo").read_text(encoding="ascii")
        found = {name: int(value) for name, value in re.findall(r"(?m)^(\w+):\s+(\d+) kB", text)}
        if "MemAvailable" in found:
            return sum(found.get(name, 0) for name in names) * 1024
    if sys.platform == "win32":
        return 1 << 62
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return physical if swap else physical // 2


def _control_groups(root: Path) -> Iterator[int]:
    """What each control group above this process leaves of its limit; pages of files count as free, they are let go.

    Version 2, and version 1's memory controller: docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html.
    """
    mounts = root / "sys/fs/cgroup"
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                top = mounts / controllers
                group = top / path.lstrip("/")
                # In a container the path may be that outside of it: its own group is then the top.
                for folder in {group, *group.parents, top}:
                    yield from _left(folder, *_CONTROL_GROUP_FILES[controllers])


def _left(folder: Path, limit: str, usage: str, file_pages: str) -> Iterator[int]:
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        most = int((folder / limit).read_text(encoding="ascii"))
        used = int((folder / usage).read_text(encoding="ascii"))
        found = re.findall(file_pages, (folder / "memory.stat").read_text(encoding="ascii"))
        yield max(0, most - used + sum(map(int, found)))
