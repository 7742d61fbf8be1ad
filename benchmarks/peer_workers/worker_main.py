"""One engine in a process of its own, driven by JSON lines; needs nothing but the standard library.

    python worker_main.py MODULE        MODULE lies beside this file and has a class Engine

Every line on standard input is {"command": NAME, ...}; the answer is one line on standard output, {"ok": true, ...}
or {"ok": false, "error": TEXT}. "load" makes Engine(**rest) and answers its `facts`; any other command calls the
method of that name with the rest and answers what it returns. The end of the input ends the process. What libraries
print goes to standard error: vLLM writes its log to standard output.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any, TextIO


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
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":  # vLLM's engine process imports this file once more
    main(sys.argv[1])
