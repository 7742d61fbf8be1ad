"""What a start compiles and tunes is all that serving asks for: a compilation stops every stream for a second or more.

Random steps after a warm-up, on the meta device; see captured_step.py. Specialisations are told apart as Triton tells
them: by types, constants, alignments and options.
"""

from __future__ import annotations

import pytest

from sleb.kernels.triton.tuning import bucket

FORMS = ("full", "low-rank", "scale")
CASES = [
    ("llama-3.1-8b", "int8", 8, True, ()),
    ("llama-2-7b", "int4", 4, False, ()),
    ("llama-2-7b", "int8", 16, True, ("low-rank",)),
]
SLOW_CASES = [
    *(("llama-3.1-8b", weights, count, True, ()) for weights in ("bf16", "int8") for count in (4, 8, 16, 32, 64)),
    *(("llama-2-7b", weights, count, True, FORMS) for weights in ("bf16", "int8", "int4") for count in (4, 64)),
    *(("llama-2-7b", weights, 8, False, FORMS) for weights in ("bf16", "int8")),
    *(
        (model, weights, count, True, ())
        for model in ("qwen3-8b", "gemma-2-9b", "mixtral-8x7b", "phi-2")
        for weights in ("bf16", "int8", "int4")
        for count in (4, 64)
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "weights", "max_num_seqs", "graphs", "forms"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
)
def test_nothing_is_compiled_while_serving(
    model, weights, max_num_seqs, graphs, forms, captured_step, random_patch, request
):
    patches = tuple(random_patch(4096, (1, "attention"), (1, "mlp"), 1, form=form) for form in forms)
    setup = captured_step.MetaSetup(model, 2, weights, max_num_seqs, patches=patches)
    for choice in (0, 1) if request.node.get_closest_marker("slow") else (1,):
        serving = captured_step.serve(setup, choice, graphs, 30)
        assert not serving.late
        assert serving.num_compiled > 15


def test_a_warm_up_is_short(captured_step):
    """Launches before a request is served; each takes some 10 µs of a host, and every block adds its own."""
    counts = [
        captured_step.serve(captured_step.MetaSetup("llama-3.1-8b", blocks, "int8"), 0, False, 0).num_launches
        for blocks in (1, 2)
    ]
    assert counts[1] - counts[0] < 600


def test_what_is_met_late_would_be_seen(captured_step, monkeypatch):
    """What the test above rests on: without steps of prompts and of several rows in the warm-up, and without graphs of
    them, serving compiles their kernels."""
    monkeypatch.setattr("sleb.engine.execute.gpu_setup.numbers_of_rows", lambda *arguments: (1,))
    monkeypatch.setattr("sleb.engine.execute.gpu_setup.prompt_step", lambda executor, *rest: one(executor))
    from sleb.engine.execute.cuda_graphs import trial_step

    def one(executor):
        return trial_step(executor, [(1, 1)])

    late = captured_step.serve(captured_step.MetaSetup("llama-3.1-8b", 1, "int8", 4), 0, False, 10).late
    assert any("_linear" in each for each in late)
    assert any(each.startswith("('") for each in late)  # a key that was not tuned


def test_operators_are_tuned_where_their_buckets_are_full(captured_step, monkeypatch):
    """The first launch of a key is the one that is measured: that with the most rows of all that share it."""
    setup = captured_step.MetaSetup("llama-3.1-8b", 1, "int8", 48)
    executor = setup.setup(captured_step.Tuner(0))._executor(setup.max_model_len, 8)
    met = []
    monkeypatch.setattr(executor, "_decode", lambda units, rows: met.append(rows))
    executor.warm_up(8)
    first = {bucket(rows): rows for rows in reversed(met)}
    assert first == {1: 1, 4: 4, 16: 16, 64: 48}
