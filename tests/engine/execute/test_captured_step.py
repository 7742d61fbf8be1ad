"""What a captured step holds: no wait for the device, and no more nodes a block than a budget allows.

A step runs on the meta device, where a wait raises; see captured_step.py. A budget is what there is today: whoever
fuses operators lowers it, and nothing raises it.
"""

from __future__ import annotations

import pytest
import torch

BUCKETS = (1, 8, 64)
# Nodes of a block at 1, 8 and 64 rows: bf16 by the vendor's products and launches beside them, should measuring choose
# those for every product; bf16, int8 and int4 by those that do what stands beside them.
BLOCK_BUDGETS = {
    "llama-2-7b": (11, 5, 5, 5),
    "llama-3.1-8b": (11, 5, 5, 5),
    "qwen3-8b": (11, 5, 5, 5),
    "gemma-2-9b": (9, 7, 7, 7),  # norms of updates
    "mixtral-8x7b": (31, 29, 29, 29),  # the router and sorting the tokens are torch's
    "phi-2": (9, 7, 7, 7),  # a LayerNorm, and heads of 80
}
WAYS = (("bf16", "composed"), ("bf16", "fused"), ("int8", "fused"), ("int4", "fused"))
# Nodes that a step has once: what comes before the blocks and after them.
STEP_BUDGETS = {"gemma-2-9b": 8}
USUAL_STEP_BUDGET = 7
# Nodes of a patch, whether or not there are rows in the step that do not get it.
PATCH_BUDGETS = {"full": 2, "low-rank": 2, "scale": 1}


@pytest.mark.parametrize("model", BLOCK_BUDGETS)
def test_nodes_of_a_block_and_of_a_step(model, captured_step):
    for (weights, way), budget in zip(WAYS, BLOCK_BUDGETS[model], strict=True):
        for bucket in BUCKETS:
            nodes = captured_step.nodes_of(model, weights, bucket, captured_step.CHOICES[way])
            case = f"{weights}, {way}, {bucket} rows"
            assert nodes.block.total() <= budget, f"{case}: {dict(nodes.block)}"
            allowed = STEP_BUDGETS.get(model, USUAL_STEP_BUDGET)
            assert nodes.step.total() <= allowed, f"{case}: {dict(nodes.step)}"


@pytest.mark.parametrize("form", PATCH_BUDGETS)
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_nodes_of_a_patch(form, weights, captured_step, random_patch):
    patch = random_patch(4096, (1, "attention"), (1, "mlp"), 1, form=form)
    setup = captured_step.MetaSetup("llama-2-7b", 2, weights, patches=(patch,))
    executor, one = setup.executor(), captured_step.MetaSetup("llama-2-7b", 1, weights).executor()
    for bucket in BUCKETS:
        decode = captured_step.decode
        alone = len(decode(executor, bucket, depths=(1, 1))) - len(decode(one, bucket))
        among = len(decode(executor, bucket, depths=(0, 1))) - len(decode(executor, bucket, depths=(0, 0)))
        assert max(alone, among) <= PATCH_BUDGETS[form], (bucket, alone, among)


def test_a_wait_would_be_seen(captured_step):
    """What the tests above rest on: launches are noted, and a number on the meta device cannot be had."""
    executor = captured_step.MetaSetup("llama-2-7b").executor()
    run = executor._decoder.run

    def waiting(token_ids, *arguments, **options):
        assert int(token_ids[0]) >= 0
        return run(token_ids, *arguments, **options)

    executor._decoder.run = waiting
    with pytest.raises(RuntimeError, match="meta"):
        captured_step.decode(executor, 8)
    assert torch.empty(1, device="meta").device == captured_step.META
