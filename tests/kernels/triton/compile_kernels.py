"""Compiles what operators launch for GPUs that need not be there, and tells what the machine code takes.

    python tests/kernels/triton/compile_kernels.py usual | matrix | oldest | everything

Run as a program, in a process where kernels are compiled, not interpreted; it prints JSON. Operators are called with
tensors without data (torch's meta device) as `compile_shapes.py` says; each launch is noted with the types and
constants that it is given, and then each kind of launch compiled once, over all processors of the machine.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
import triton
from compile_shapes import CARDS, PROCESSORS, cases
from triton._utils import canonicalize_dtype
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import sleb.kernels.triton as package

# Of a launch that are no arguments of the kernel; the first two every launch has to name.
OPTIONS = ("num_warps", "enable_fp_fusion", "num_stages", "launch_pdl", "num_ctas", "maxnreg")
_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


def modules():
    """Every module of sleb.kernels.triton."""
    names = sorted(path.stem for folder in package.__path__ for path in Path(folder).glob("*.py"))
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names if name != "__init__"]


def kernels(found):
    """`module.name` to kernel: what a function that is no kernel itself has to do with, and so launches."""
    launched = {}
    for module in found:
        jitted = {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}
        host = [
            node
            for node in ast.parse(inspect.getsource(module)).body
            if not (isinstance(node, ast.FunctionDef) and node.name in jitted)
        ]
        for node in itertools.chain.from_iterable(map(ast.walk, host)):
            if isinstance(node, ast.Name) and node.id in jitted:
                kernel = jitted[node.id].fn
                launched[f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"] = jitted[node.id]
    return launched


class Session:
    """Notes launches: `launches`, each with the number of its job, and `jobs`, each once."""

    def __init__(self):
        self.launches, self.jobs, self._numbers, self.lacking = [], [], {}, []
        self.arch, self.label, self.every, self.others = 0, "", False, 0

    def note(self, name, kernel, arguments, keywords):
        parameters = kernel.params
        given = dict(zip((each.name for each in parameters), arguments, strict=False)) | keywords
        options = {option: given.pop(option) for option in OPTIONS if option in given}
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(parameters):
            value = given.get(parameter.name, parameter.default)
            signature[parameter.name], divisible = _type_of(value, parameter)
            if signature[parameter.name] == "constexpr":
                constants[(index,)] = value
            elif divisible:
                attributes[(index,)] = [["tt.divisibility", 16]]
        job = (name, self.arch, signature, constants, attributes, options)
        number = self._numbers.setdefault(repr(job), len(self.jobs))
        if number == len(self.jobs):
            self.jobs.append((kernel, *job))
        named = {key: value for key, value in given.items() if key.isupper()}
        launch = {"kernel": name, "arch": self.arch, "label": self.label, "first": not self.others}
        self.launches.append(
            {**launch, "job": number, "dtypes": sorted(set(signature.values())), **options, **named}
        )

    def tuned(self, key, configs, launch):
        """Stands where operators choose: the first configuration of each kind runs, with `every` all of them."""
        if not configs:
            self.lacking.append(f"{self.label} for {self.arch}: {key}")
        kinds = set()
        for config in configs:
            other = tuple(config) in kinds
            kinds.add(tuple(config))
            if self.every or not other:
                self.others += other
                launch.run(config)
                self.others -= other


class Recorder:
    """Stands where a module has a kernel: `kernel[grid](...)` is noted."""

    def __init__(self, name, kernel, session):
        self._name, self._kernel, self._session = name, kernel, session

    def __getitem__(self, grid):
        assert all(isinstance(size, int) and size > 0 for size in grid), f"{self._name}: a grid of {grid}"
        return lambda *args, **keywords: self._session.note(self._name, self._kernel, args, keywords)


def _type_of(value, parameter):
    """An argument's type as Triton's launcher finds it, and whether it is known to be a multiple of 16."""
    aligned = not parameter.do_not_specialize_on_alignment
    if isinstance(value, torch.Tensor):
        return "*" + canonicalize_dtype(value.dtype), aligned
    if parameter.is_constexpr or value is None:
        return "constexpr", False
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, float):
        return "fp32", False
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    if parameter.do_not_specialize:
        return kind, False
    return ("constexpr", False) if value == 1 else (kind, aligned and value % 16 == 0)


def note_all(level):
    """A session with the launches of a level, for every architecture of it."""
    session = Session()
    found = modules()
    with ExitStack() as stack:

        def put(name, value):
            for module in found:
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))

        for name, kernel in kernels(found).items():
            recorder = Recorder(name, kernel, session)
            for module in found:
                for attribute in [key for key, value in vars(module).items() if value is kernel]:
                    stack.enter_context(mock.patch.object(module, attribute, recorder))
        put("tuned", session.tuned)
        put("num_processors", lambda device: PROCESSORS)
        put("shared_memory", lambda device: CARDS[session.arch])
        put("pdl_launch", lambda device: {"launch_pdl": True} if session.arch >= 90 else {})
        stack.enter_context(torch.device("meta"))
        for session.arch, session.every, session.label, work in cases(level):
            work()
    return session


def compile_job(number):
    """What the machine code of a job takes, or why there is none."""
    kernel, _, arch, signature, constants, attributes, options = _SESSION.jobs[number]
    if not options.keys() >= set(OPTIONS[:2]):
        return {"error": "launched without launch_options()"}
    try:
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # whatever the compiler raises is a finding
        while error.__cause__ is not None:  # the line in the kernel that is called by a kernel
            error = error.__cause__
        return {"error": f"{type(error).__name__}: {error}"[-500:]}
    ptx = compiled.asm["ptx"]
    return {
        **resources(compiled.asm["cubin"]),
        # The form .cg has 16 bytes; .ca, of 4 or 8, is what is left where alignment is not known.
        "loads": ptx.count("cp.async.cg"),
        "narrow": ptx.count("cp.async.ca"),
        "wide": len(re.findall(r"ld\.global[\w.:]*\.(?:v4\.b32|v2\.b64|v4\.f32|v8\.b32|v4\.b64)", ptx)),
        "barriers": barriers(ptx),
        "products": next((name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in ptx), None),
        "waits": "griddepcontrol.wait" in ptx,
        "shared": compiled.metadata.shared,
    }


def barriers(ptx):
    """Those within innermost loops that read global memory, in all."""
    lines, labels, loops = ptx.splitlines(), {}, []
    for at, line in enumerate(lines):
        if label := re.match(r"(\$L\w+):", line.strip()):
            labels[label[1]] = at
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+)", line)
        if branch and branch[1] in labels:
            loops.append((labels[branch[1]], at))
    bodies = [
        "\n".join(lines[start:end])
        for start, end in loops
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in loops)
    ]
    return sum(len(re.findall(r"\bbar(?:rier)?\.", body)) for body in bodies if "ld.global" in body)


def resources(cubin):
    """Registers of a thread, and its stack and local memory in bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_BIN / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


def main(level):
    global _SESSION
    _SESSION = note_all(level)
    processors = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("fork").Pool(processors) as pool:
        results = pool.map(compile_job, range(len(_SESSION.jobs)), chunksize=1)
        pool.close()
        pool.join()
    records = [launch | results[launch["job"]] for launch in _SESSION.launches]
    made = {"kernels": sorted(kernels(modules())), "lacking": _SESSION.lacking, "records": records}
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = round(sum(each.ru_utime + each.ru_stime for each in spent))
    print(f"{len(results)} kernels compiled in {seconds} seconds of a processor", file=sys.stderr)
    print(json.dumps({"triton": triton.__version__, "cards": CARDS, **made}))


if __name__ == "__main__":
    main(sys.argv[1])
