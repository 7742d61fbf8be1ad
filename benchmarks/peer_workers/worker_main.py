"""One engine in a process of its own, driven by JSON lines; needs nothing but the standard library.

    python worker_main.py MODULE        MODULE lies beside this file and has a class Engine

Every line on standard input is {"command": NAME, ...}; the answer is one line on standard output, {"ok": true, ...}
or {"ok": false, "error": TEXT}, with "mendable": true where the user can mend it. "load" makes Engine(**rest) and
answers its `facts`; any other command calls the method of that name with the rest and answers what it returns. The
end of the input ends the process. What libraries print goes to standard error: vLLM writes its log to standard output.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any, TextIO

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent() -> None:
    """Asks the system to kill this process when the one that started it ends; only Linux can.

    One that is in the middle of a run, or stopped, does not see the end of its input.
    """
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):  # another system
        pass


def main(module: str) -> None:
    """Answers commands until the input ends."""
    # Copies that children do not inherit: one that reads or prints cannot break the protocol.
    commands = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    serve(module, commands, answers)


def serve(module: str, commands: TextIO, answers: TextIO) -> None:
    """Reads commands and writes answers, one each."""
    engine: Any = None
    for line in commands:
        request = json.loads(line)
        command = request.pop("command")
        try:
            if command == "load":
                engine = importlib.import_module(module).Engine(**request)
                answer = engine.facts
            else:
                answer = getattr(engine, command)(**request)
            answer = {"ok": True, **answer}
        except Exception as error:
            answer = _failure(error)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _failure(error: Exception) -> dict[str, Any]:
    # By name, since the environments of other engines have this package not.
    if any(each.__name__ == "SlebError" for each in type(error).__mro__):
        return {"ok": False, "mendable": True, "error": str(error)}
    traceback.print_exc()
    return {"ok": False, "error": f"{type(error).__name__}: {error}"}


if __name__ in (
    "__main__",
    "__mp_main__",
):  # the second: a process that the engine spawns in turn, as vLLM does
    die_with_parent()
if __name__ == "__main__":
    main(sys.argv[1])
