"""A step's integers against loops that say what each one is, and the three executors on the same ones."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from sleb.engine.execute.step_arrays import NEVER, StepArrays, StepLayout, unit_rows
from sleb.engine.requests.tier import Tier
from sleb.engine.schedule.step import ScheduledRow
from sleb.kernels import registry
from sleb.layer_map.layer_map import Unit

DEPTHS = (0, 1, 3, 6)
CHAIN = (Unit(3), Unit(1), Unit(4, "attention"), Unit(2), Unit(4, "mlp"), Unit(0))
PADDING_PAGE = 700


def tier(depth):
    return Tier(f"model:sleb-{depth}", depth, f"digest-{depth}", 1, ())


@pytest.fixture
def random_step(make_request):
    """random_step(rng): rows by depth, their requests' pages, and the place of each pending token in the last ones."""

    def make(rng, page_size):
        rows, sampled = [], {}
        for depth in sorted(rng.choice(DEPTHS) for _ in range(rng.randrange(1, 10))):
            num_known = rng.randrange(1, 90)
            request = make_request([rng.randrange(999) for _ in range(num_known)], tier(depth))
            kind = rng.choice(["pending", "decode", "chunk", "prompt"])
            end = num_known if kind in ("decode", "prompt") else rng.randrange(1, num_known + 1)
            start = {"decode": num_known - 1, "prompt": 0}.get(kind, rng.randrange(end))
            if kind == "pending":
                start, end = num_known, num_known + 1
                sampled[request] = rng.randrange(50)
                request.num_pending = 1
            num_pages = -(-end // page_size) + rng.choice([0, 0, 2])
            request.pages = rng.sample(range(PADDING_PAGE), num_pages)
            if rng.random() < 0.5:  # pages that an earlier step has converted already
                StepArrays.of([ScheduledRow(request, 0, 1)], ((0, NEVER),), page_size)
            rows.append(ScheduledRow(request, start, end - start))
        return rows, sampled

    return make


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_every_integer_of_random_steps(first, random_step):
    for seed in range(first, first + 100):
        rng = random.Random(seed)
        page_size = rng.choice([4, 16, 32])
        rows, sampled = random_step(rng, page_size)
        removed_at = [rng.choice([NEVER, 1, 2, 3, 4, 6]) for _ in range(7)]
        ranges = [(0, end) for end in removed_at] + [(1, 3), (2, NEVER), (4, 5)]  # sublayers, then patches
        step = StepArrays.of(rows, tuple(ranges), page_size, sampled)

        tokens, positions, slots, sources, starts, contexts, pages, page_starts = (
            [],
            [],
            [],
            [],
            [0],
            [],
            [],
            [],
        )
        for row in rows:
            request = row.request
            for position in range(row.start, row.end):
                known = position < len(request.tokens)
                tokens.append(request.tokens[position] if known else 0)
                sources.append(-1 if known else sampled[request])
                positions.append(position)
                slots.append(request.pages[position // page_size] * page_size + position % page_size)
            starts.append(len(tokens))
            contexts.append(row.end)
            page_starts.append(len(pages))
            pages += request.pages
        width = max(len(row.request.pages) for row in rows)
        table = [row.request.pages + [0] * (width - len(row.request.pages)) for row in rows]
        running = [[row for row in rows if a <= row.request.tier.depth < b] for a, b in ranges]
        before = [sum(row.request.tier.depth < a for row in rows) for a, _ in ranges]

        assert list(step.depths) == [row.request.tier.depth for row in rows]
        assert step.token_ids.tolist() == tokens and step.positions.tolist() == positions
        assert (step.sources.tolist() if step.sources else [-1] * len(tokens)) == sources
        assert (step.sources is None) == (not sampled)
        assert step.query_starts.tolist() == starts and step.context_lens.tolist() == contexts
        assert step.query_lens == tuple(row.num_tokens for row in rows)
        assert step.pages.tolist() == pages and step.page_starts.tolist() == page_starts
        assert step.slots.tolist() == slots and step.page_table.tolist() == table
        assert all(
            some == rows[at:][: len(some)] for at, some in zip(before, running, strict=True)
        )  # one range
        assert step.unit_starts.tolist() == before
        assert step.unit_rows.tolist() == [at + len(some) for at, some in zip(before, running, strict=True)]
        assert step.unit_first_tokens.tolist() == [starts[at] for at in before]
        counts = [sum(row.num_tokens for row in some) for some in running]
        assert [*map(int.__sub__, step.unit_tokens, step.unit_first_tokens)] == counts
        assert (step.num_tokens, step.num_sequences) == (len(tokens), len(rows))

        spare, free = rng.choice([0, 5]), rng.choice([0, 3])  # rows of a bucket that the step does not fill
        layout = StepLayout(len(tokens) + spare, len(rows) + free, len(ranges))
        samples, table_width = (
            rng.sample(range(len(tokens)), rng.randrange(min(len(rows), len(tokens)) + 1)),
            50,
        )
        flat = step.pack(layout, PADDING_PAGE, samples, table_width)
        sections = layout.split(torch.from_numpy(flat))
        assert sections.token_ids.tolist() == tokens + [0] * spare
        assert sections.positions.tolist() == positions + [0] * spare
        assert sections.slots.tolist() == slots + [PADDING_PAGE * page_size] * spare
        assert sections.sources.tolist() == sources + [-1] * spare
        assert sections.query_starts.tolist() == starts + [len(tokens) + 1 + i for i in range(free)]
        assert sections.context_lens.tolist() == contexts + [1] * free
        assert sections.row_counts.tolist() == step.unit_rows.tolist()
        assert sections.token_starts.tolist() == step.unit_first_tokens.tolist()
        assert sections.token_counts.tolist() == step.unit_tokens.tolist()
        assert sections.table_rows.tolist() == [*range(len(rows))] + [0] * free
        assert sections.samples.tolist() == samples + [0] * (len(rows) + free - len(samples))
        kept = np.zeros((len(rows), table_width), np.int32)
        places, new = np.split(
            flat[layout.size :], 2
        )  # nobody has admitted these: all of their pages are new
        kept.ravel()[places] = new
        assert flat.dtype == np.int32 and kept[:, :width].tolist() == table and not kept[:, width:].any()


def test_the_prefix_rule():
    """Depths 0, 0, 3, 6: a unit that goes at depth 1 has two rows, one that goes at 4 three, one that stays all."""
    ends = (1, 3, 4, 6, 7, NEVER)
    starts, rows = unit_rows((0, 0, 3, 6), tuple((0, end) for end in ends))
    assert (starts.tolist(), rows.tolist()) == ([0] * 6, [2, 2, 3, 3, 4, 4])
    assert unit_rows((3,), ((0, 1), (0, 3), (0, 4)))[1].tolist() == [0, 0, 1]


def test_a_patch_has_the_rows_of_its_depths() -> None:
    starts, ends = unit_rows((0, 0, 3, 4, 4, 6), ((1, NEVER), (3, 4), (4, 6), (1, 3)))
    assert list(zip(starts, ends, strict=True)) == [(2, 6), (2, 3), (3, 5), (2, 2)]


def test_the_three_executors_give_the_same(tiny_model, make_llm, make_request):
    """Sequences of four depths in random chunks over ragged pages, single tokens pending on the GPU's executor: after
    every step the same logits."""
    pytest.importorskip("triton")  # the interpreter, or a GPU: the registry asks for one
    model, options = tiny_model("llama-gqa"), {"page_size": 16, "max_num_batched_tokens": 512}
    executors = {"eager": make_llm(model, CHAIN, DEPTHS, **options).engine.runner.executor}
    if registry.select_kernels("auto", torch.device("cpu")).cpu is not None:
        executors["cpu"] = make_llm(model, CHAIN, DEPTHS, kernels="cpu", **options).engine.runner.executor
    for name in ("gpu", "gpu-replayed"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registry, "triton_gpu_kernels", registry.torch_gpu_kernels)
            llm = make_llm(model, CHAIN, DEPTHS, kernels="triton", **options)
        executors[name] = llm.engine.runner.executor
    executors["gpu-replayed"].capture([8], lambda function: function, prompts=[20, 90])
    assert {each.unit_depths for each in executors.values()} == {executors["eager"].unit_depths}
    unit_depths = executors["eager"].unit_depths

    rng = random.Random(9)
    pages = iter(rng.sample(range(32), 32))
    sequences = []
    for depth in (0, 0, 1, 3, 3, 6, 6):
        tokens = [rng.randrange(3, 90) for _ in range(rng.randrange(3, 60))]
        request = make_request(tokens, tier(depth), [next(pages) for _ in range(-(-len(tokens) // 16))])
        sequences.append([request, 0])
    num_steps = num_pending = 0
    while any(done < len(request.tokens) for request, done in sequences):
        decoding = num_steps % 2 == 1  # one token each, as graphs take them
        rows, pending_rows = [], []
        for sequence in sequences:
            request, done = sequence
            num_tokens = min(1 if decoding else rng.randrange(20), len(request.tokens) - done)
            if num_tokens == 0:
                continue
            rows.append(ScheduledRow(request, done, num_tokens))
            # The same row; where it is one token that is not the first, the device alone knows it.
            known = done if num_tokens == 1 and done else done + num_tokens
            known = make_request(request.tokens[:known], request.tier, request.pages)
            pending_rows.append(ScheduledRow(known, done, num_tokens))
            sequence[1] += num_tokens
        if not rows:
            continue
        late = [row for row in pending_rows if row.pending]
        places = {row.request: place for place, row in enumerate(reversed(late))}
        last = torch.tensor(
            [
                row.request.tokens[row.start]
                for row, same in zip(rows, pending_rows, strict=True)
                if same.pending
            ]
        ).flip(0)
        step = StepArrays.of(rows, unit_depths, 16)
        pending_step = StepArrays.of(pending_rows, unit_depths, 16, places)
        expected = executors["eager"].logits(executors["eager"].run(step, [], greedy=False).hidden)
        for name, executor in executors.items():
            arrays = pending_step if name.startswith("gpu") else step
            logits = executor.logits(executor.run(arrays, [], greedy=False, last=last).hidden)
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        num_steps, num_pending = num_steps + 1, num_pending + len(late)
    assert num_steps > 10 and num_pending > 10
