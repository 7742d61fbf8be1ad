"""What the launches of a captured decode step cost beside its bytes: a model, from counted nodes. No GPU is asked.

    .venv/bin/python tests/engine/execute/nodes_model.py FILE [--beside OLDER]

writes a result file; OLDER is one that this command wrote for an earlier commit, whose rows stand beside. The time of a
step is taken to be that of reading its weights and KV once at the memory's full bandwidth, and for each node what is
lost where one kernel ends and the next begins: more for a matrix product, whose first and last tiles leave most of the
GPU without work. Counted are the products and the others by captured_step.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import captured_step  # noqa: E402
import torch  # noqa: E402

from sleb.benchmarks.environment import describe_machine, shown_command  # noqa: E402
from sleb.benchmarks.old import load  # noqa: E402
from sleb.benchmarks.record import Measurement, Result, write_result  # noqa: E402
from sleb.engine.model.allocation import allocate  # noqa: E402
from sleb.engine.model.weights import num_bytes  # noqa: E402
from sleb.kernels.quantization import WEIGHT_FORMATS  # noqa: E402

BANDWIDTH = 4.8e12  # bytes a second, of an H200 (NVIDIA's data sheet)
# Seconds that are taken to be lost at a product and at another node, and where each launch may start before the one
# ahead of it has ended (programmatic dependent launch).
LOST = (2.5e-6, 2.2e-6)
LOST_DEPENDENT = (0.8e-6, 1.0e-6)
# model, blocks of it (None: all), weights, rows, tokens of context
CASES = (
    *(
        ("llama-2-7b", None, weights, rows, 128)
        for weights in ("bf16", "int8", "int4")
        for rows in (1, 8, 64)
    ),
    ("llama-2-70b", 64, "bf16", 64, 128),
)


def measure(model: str, blocks: int | None, weights: str, rows: int, context: int) -> list[Measurement]:
    """The figures of one case, of the kernels that have the fewest nodes."""
    spec = captured_step.spec_of(model)
    num_blocks = blocks or spec.num_blocks
    ways = [captured_step.nodes_of(model, weights, rows, each) for each in captured_step.CHOICES.values()]
    nodes = min(ways, key=lambda each: each.block.total())
    sublayers = {(block, part) for block in range(num_blocks) for part in ("attention", "mlp")}
    allocated, _ = allocate(spec, sublayers, torch.bfloat16, captured_step.META, WEIGHT_FORMATS.get(weights))
    read = num_bytes(allocated) - (0 if spec.tied_embeddings else num_bytes(allocated.embed))
    kv = 2 * rows * context * num_blocks * 2 * spec.kv_size
    floor = (read + kv) / BANDWIDTH

    def products(counted: Counter[str]) -> int:
        return sum(count for name, count in counted.items() if captured_step.Launch(name).is_product)

    num_products = num_blocks * products(nodes.block) + products(nodes.step)
    others = num_blocks * nodes.block.total() + nodes.step.total() - num_products
    time, dependent = (floor + lost[0] * num_products + lost[1] * others for lost in (LOST, LOST_DEPENDENT))
    of_all = "" if blocks is None else f" of {num_blocks} blocks"
    case = f"{model}{of_all} {weights}, {rows} {'row' if rows == 1 else 'rows'}, {context} tokens of context"
    facts = {
        "roofline_share": floor / time,
        "of roofline, were launches dependent": round(floor / dependent, 3),
    }
    return [
        Measurement(case, "now", "nodes a block", round(nodes.block.total(), 1)),
        Measurement(case, "now", "nodes a step", round(num_products + others)),
        Measurement(case, "now", "modelled ms", time * 1e3, facts=facts),
    ]


def model(path: Path, command: list[str], beside: Path | None = None) -> None:
    """Writes the result file of all cases; beside: an older one, whose rows come before."""
    now = [each for case in CASES for each in measure(*case)]
    older = [] if beside is None else load(beside).measurements
    before = {(each.case, each.metric): replace(each, subject="before") for each in older}
    rows = [row for each in now for row in (before.get((each.case, each.metric)), each) if row is not None]
    environment = describe_machine(torch.device("cpu"), torch.bfloat16, "triton", shown_command(command))
    settings = {"bandwidth": BANDWIDTH, "lost": LOST, "lost, were launches dependent": LOST_DEPENDENT}
    notes = [
        "A model, not a measurement: nothing ran. Nodes are counted on the meta device, the bandwidth is an H200's by "
        "its data sheet, and what is lost at a node is assumed. Those of the kernels that have the fewest nodes: where "
        "measuring chooses the vendor's products and launches beside them, there are more.",
    ]
    if beside is not None:
        notes.append(f"before: commit {load(beside).environment.get('commit')}")
    write_result(path, Result("nodes model", environment, settings, rows, notes))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--beside", type=Path, help="a result of this command for an earlier commit")
    given = parser.parse_args()
    model(given.file, ["python", *sys.argv], given.beside)
