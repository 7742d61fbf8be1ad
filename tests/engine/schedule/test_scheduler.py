"""Scheduler and page accounting under invented traffic: no model, a "forward" that only records what it would write.

A shadow memory holds, for every slot of the cache, the token, position, tier and the exact past that was written
there. Before a step "runs", every earlier position of every scheduled row must hold exactly that row's own past. A
page table that is only ever updated by what is new in each step must hold every scheduled row's pages.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleb.engine.execute.step_arrays import NEVER, StepArrays, StepLayout
from sleb.engine.requests.tier import Tier
from sleb.engine.schedule.block_manager import BlockManager
from sleb.engine.schedule.scheduler import Scheduler

TIERS = tuple(Tier(f"model:{depth}", depth, f"digest-{depth}", 1, ()) for depth in (0, 3, 6))


class World:
    """A scheduler, its shadow memory and the answers that requests are still owed.

    overlap: a step's tokens are read after the next one was launched, as the engine does on a GPU. Until then the
    scheduler knows only that there is one, `unread` is what the device knows. late: requests end before max_tokens,
    so an end is seen one step late.
    """

    def __init__(
        self,
        make_request,
        *,
        num_pages,
        page_size,
        max_num_seqs,
        budget,
        caching=True,
        overlap=False,
        late=True,
    ):
        self.make_request = make_request
        self.pages = BlockManager(num_pages, page_size, caching)
        self.scheduler = Scheduler(self.pages, max_num_seqs, budget)
        self.page_size, self.capacity = page_size, num_pages * page_size
        self.max_num_seqs, self.budget = max_num_seqs, budget
        self.shadow = {}
        self.owed = {}
        self.overlap, self.late = overlap, late
        self.in_flight, self.unread = None, {}
        self.table = np.full((max_num_seqs, num_pages), -1)  # what a device has of the pages
        self.packed = self.table.copy()  # the same, by the indices in the packed step
        self.finished, self.num_steps = [], 0

    def add(self, tokens, tier, num_new, parent=None):
        most = self.capacity - len(tokens) if self.late else num_new
        request = self.make_request(tokens, tier, max_tokens=most)
        request.parent = parent
        self.owed[request] = num_new
        self.scheduler.add(request)
        self.check()
        return request

    def abort(self, request):
        request.finish_reason = "abort"
        self.scheduler.remove(request)
        del self.owed[request]
        self.check()

    def step(self, sample=lambda request: 1):
        """Schedule, "run", sample and commit as the engine does; everything is checked on the way."""
        step = self.scheduler.schedule()
        self.check()
        waits = self.in_flight is not None and self.in_flight.rows
        assert step.rows or waits or not self.owed, "nothing is scheduled, but requests wait"
        self.check_rows(step)
        if step.rows:
            self.check_table(step)
        self.run(step)
        for row in step.rows:
            if row.samples:
                self.unread.setdefault(row.request, []).append(sample(row.request))
        self.scheduler.launched(step.rows)
        done, self.in_flight = (self.in_flight, step) if self.overlap else (step, None)
        if done is not None:
            self.finish(done)
        self.num_steps += 1
        return step

    def finish(self, step):
        self.scheduler.commit(step.rows)
        self.check()
        for row in step.rows:
            request = row.request
            request.num_pending -= row.chooses
            if not row.samples:
                continue
            token = self.unread[request].pop(0)
            if request not in self.owed:  # ended or dropped meanwhile
                continue
            request.tokens.append(token)
            self.owed[request] -= 1
            if self.owed[request] == 0:
                del self.owed[request]
                request.finish_reason = "stop"
                self.scheduler.remove(request)
                self.finished.append(request)
            self.check()

    def tokens(self, request):
        """What the device knows."""
        return [*request.tokens, *self.unread.get(request, [])]

    def check_rows(self, step):
        assert step.num_tokens <= self.budget
        assert len(step.rows) <= self.max_num_seqs
        assert len({id(row.request) for row in step.rows}) == len(step.rows)
        depths = [row.request.tier.depth for row in step.rows]
        assert depths == sorted(depths), "rows must be in order of depth"
        for row in step.rows:
            assert row.request in self.scheduler.running
            assert row.num_tokens >= 1
            assert row.start == row.request.num_computed
            assert row.end <= len(self.tokens(row.request))
            assert row.pending == (row.start >= len(row.request.tokens))
            assert row.end <= len(row.request.pages) * self.page_size
            assert len(set(row.request.pages)) == len(row.request.pages)

    def check_table(self, step):
        pending = {row.request: 0 for row in step.rows if row.pending}
        arrays = StepArrays.of(step.rows, ((0, NEVER),), self.page_size, pending)
        for row, first, ids in arrays.new_pages:
            self.table[row, first : first + len(ids)] = ids
        layout = StepLayout(arrays.num_tokens, arrays.num_sequences, 1)
        flat = arrays.pack(layout, 0, [], self.table.shape[1])
        places, pages = np.split(flat[layout.size :], 2)
        self.packed.ravel()[places] = pages
        assert len(set(arrays.table_rows)) == len(step.rows)
        for row, at in zip(step.rows, arrays.table_rows, strict=True):
            pages = row.request.pages
            assert self.table[at, : len(pages)].tolist() == self.packed[at, : len(pages)].tolist() == pages

    def slot(self, request, position):
        return request.pages[position // self.page_size] * self.page_size + position % self.page_size

    def run(self, step):
        written = Counter(self.slot(row.request, p) for row in step.rows for p in range(row.start, row.end))
        assert all(count == 1 for count in written.values()), "two rows write one slot"
        for row in step.rows:
            request = row.request
            for position in range(row.start):
                wanted = (request.tier.digest, tuple(self.tokens(request)[: position + 1]))
                found = self.shadow.get(self.slot(request, position))
                assert found == wanted, f"position {position} holds {found}, not {wanted}"
                assert self.slot(request, position) not in written, "a slot is read and written in one step"
        for row in step.rows:
            request = row.request
            for position in range(row.start, row.end):
                page = request.pages[position // self.page_size]
                assert self.pages._references[page] == 1, "a shared page is written"
                assert page not in self.pages._key_of, "a page that others can find is written"
                slot = self.slot(request, position)
                self.shadow[slot] = (request.tier.digest, tuple(self.tokens(request)[: position + 1]))

    def check(self):
        self.scheduler.check_integrity()
        owned = Counter(page for request in self.scheduler.requests for page in request.pages)
        assert self.pages.num_free == self.pages.num_pages - len(owned)
        assert {id(request) for request in self.scheduler.requests} == {id(request) for request in self.owed}
        for page, (parent, tokens) in self.pages._key_of.items():
            assert len(tokens) == self.page_size, f"page {page} under {parent} is findable, but not full"

    def drain(self, sample, limit):
        while self.owed:
            self.step(sample)
            assert self.num_steps < limit, f"{len(self.owed)} requests starve"


worlds = st.fixed_dictionaries(
    {
        "num_pages": st.integers(3, 12),
        "page_size": st.sampled_from([1, 2, 3, 4]),
        "max_num_seqs": st.integers(1, 5),
        "budget": st.integers(1, 12),
        "caching": st.booleans(),
        "overlap": st.booleans(),
        "late": st.booleans(),
    }
)


def invent(traffic, rng, num_requests, alphabet):
    """Requests that arrive, grow and are aborted at random moments, until none is left.

    A small alphabet makes shared prefixes, few pages make preemptions.
    """
    expected, num_hits, arrivals = {}, 0, num_requests
    limit = 400 + 60 * num_requests * traffic.capacity
    while arrivals or traffic.owed:
        if arrivals and (not traffic.owed or rng.random() < 0.4):
            arrivals -= 1
            room = rng.randint(2, traffic.capacity)  # tokens of prompt and answer, as the engine limits them
            length = rng.randint(1, room - 1)
            tokens = [rng.randrange(alphabet) for _ in range(length)]
            tier = rng.choice(TIERS)
            request = traffic.add(tokens, tier, rng.randint(1, room - length))
            expected[request] = length + traffic.owed[request]
            for _ in range(rng.choice([0, 0, 2])):
                fork = traffic.add(tokens, tier, rng.randint(1, room - length), parent=request)
                expected[fork] = length + traffic.owed[fork]
        elif traffic.owed and rng.random() < 0.03:
            victim = rng.choice(list(traffic.owed))
            traffic.abort(victim)
            del expected[victim]
        else:
            step = traffic.step(lambda request: rng.randrange(alphabet))
            num_hits += sum(row.request.num_cached_tokens > 0 for row in step.rows)
        assert traffic.num_steps < limit, "somebody starves"
    assert set(traffic.finished) == set(expected)
    assert all(len(request.tokens) == total for request, total in expected.items())
    assert traffic.pages.num_free == traffic.pages.num_pages and traffic.pages.usage == 0.0
    return num_hits


@settings(max_examples=150)
@given(
    world=worlds,
    seed=st.integers(0, 2**32),
    num_requests=st.integers(1, 14),
    alphabet=st.sampled_from([1, 2, 50]),
)
def test_invented_traffic(world, seed, num_requests, alphabet, make_request):
    """All requests that are not aborted finish, each with its own past in the cache at every step."""
    invent(World(make_request, **world), random.Random(seed), num_requests, alphabet)


@pytest.mark.parametrize("overlap", [False, True])
def test_invented_traffic_meets_preemptions_and_hits(make_request, overlap):
    """That the property above is not proved on idle worlds."""
    world = World(make_request, num_pages=9, page_size=2, max_num_seqs=4, budget=7, overlap=overlap)
    num_hits = invent(world, random.Random(1), num_requests=80, alphabet=2)
    assert num_hits > 10 and world.scheduler.num_preemptions > 10


@pytest.mark.parametrize("caching", [False, True])
def test_forks_take_over_the_pages_of_their_parent(make_request, caching):
    """A prompt of 9 tokens in pages of 4: the forks wait for two full pages and compute the ninth token alone."""
    world = World(make_request, num_pages=40, page_size=4, max_num_seqs=8, budget=5, caching=caching)
    parent = world.add(list(range(9)), TIERS[0], 6)
    forks = [world.add(list(range(9)), TIERS[0], 6, parent=parent) for _ in range(2)]
    other = world.add([50], TIERS[0], 3)  # is not held up by them
    assert [(row.request, row.num_tokens) for row in world.step().rows] == [(parent, 5)]
    assert [(row.request, row.num_tokens) for row in world.step().rows] == [(parent, 4), (other, 1)]
    rows = {row.request: (row.start, row.num_tokens) for row in world.step().rows}
    assert rows[forks[0]] == rows[forks[1]] == (8, 1)
    assert parent.pages[:2] == forks[0].pages[:2] == forks[1].pages[:2]
    assert len({request.pages[2] for request in (parent, *forks)}) == 3
    world.drain(lambda request: 7, limit=100)


def test_a_fork_of_what_has_ended_computes_its_prompt(make_request):
    world = World(make_request, num_pages=20, page_size=4, max_num_seqs=8, budget=50, caching=False)
    parent = world.add(list(range(9)), TIERS[0], 6)
    fork = world.add(list(range(9)), TIERS[0], 6, parent=parent)
    world.step()
    world.abort(parent)
    assert [(row.request, row.num_tokens) for row in world.step().rows] == [(fork, 9)]


def test_a_fork_of_pages_whose_beginning_was_found_elsewhere_and_is_gone(make_request):
    """Two compute the same first page; the one that others find is given away, then a fork names the other's anew."""
    world = World(make_request, num_pages=6, page_size=2, max_num_seqs=4, budget=50, late=False)
    world.add([1, 1, 7], TIERS[0], 1)
    parent = world.add([1, 1, 2, 2, 3], TIERS[0], 6)
    world.step()
    world.add([9] * 5, TIERS[0], 1)  # takes all pages that are left
    world.step()
    fork = world.add([1, 1, 2, 2, 3], TIERS[0], 1, parent=parent)
    world.step()
    assert fork in world.finished
    world.drain(lambda request: 7, limit=100)
    again = world.add([1, 1, 2, 2, 3], TIERS[0], 1)
    world.step()
    assert again.num_cached_tokens == 4


def test_preemption_takes_the_latest_and_nobody_starves(make_request):
    """Three long answers in a cache for little more than one: they finish in order of arrival."""
    world = World(make_request, num_pages=10, page_size=2, max_num_seqs=8, budget=64)
    requests = [world.add([index] * 4, TIERS[0], 15) for index in range(3)]
    world.drain(lambda request: 9, limit=500)
    assert world.finished == requests
    assert world.scheduler.num_preemptions > 0


def test_a_preempted_request_goes_before_new_ones(make_request):
    world = World(make_request, num_pages=6, page_size=2, max_num_seqs=2, budget=64, caching=False)
    first, second, late = (world.add([index] * 5, TIERS[0], 6) for index in range(3))
    while not world.scheduler.num_preemptions:
        world.step()
    assert list(world.scheduler.waiting) == [second, late]
    world.drain(lambda request: 4, limit=100)
    assert world.finished == [first, second, late]


def test_first_come_first_served(make_request):
    """A small request behind a large one that does not fit yet must wait for it."""
    world = World(make_request, num_pages=8, page_size=2, max_num_seqs=8, budget=64)
    first = world.add([1] * 9, TIERS[0], 3)
    large, small = world.add([2] * 12, TIERS[0], 1), world.add([3], TIERS[0], 1)
    step = world.step()
    assert [row.request for row in step.rows] == [first]
    world.drain(lambda request: 4, limit=100)
    assert world.finished == [first, large, small]


def test_a_prompt_is_chunked_beside_running_answers(make_request):
    """Running answers take one token each of the budget first; the rest goes to the prompt."""
    world = World(make_request, num_pages=40, page_size=4, max_num_seqs=8, budget=8)
    world.add([1, 2], TIERS[0], 30)
    world.add([3, 4], TIERS[1], 30)
    world.step()
    long = world.add([5] * 21, TIERS[0], 2)
    chunks = []
    while long.num_output_tokens == 0:
        step = world.step()
        assert len(step.rows) == 3
        chunks += [row.num_tokens for row in step.rows if row.request is long]
    assert chunks == [6, 6, 6, 3]


def test_max_num_seqs_limits_running(make_request):
    world = World(make_request, num_pages=50, page_size=4, max_num_seqs=3, budget=100)
    for index in range(7):
        world.add([index], TIERS[0], 4)
    world.step()
    assert (len(world.scheduler.running), len(world.scheduler.waiting)) == (3, 4)
    world.drain(lambda request: 1, limit=100)


@pytest.mark.parametrize("page_size", [1, 4])
def test_prefix_hits_only_for_equal_tokens_and_tier(page_size, make_request):
    world = World(make_request, num_pages=60, page_size=page_size, max_num_seqs=8, budget=100)
    tokens = list(range(1, 14))

    def hit(prompt, tier):
        request = world.add(prompt, tier, 1)
        world.step()
        return request.num_cached_tokens

    whole = 12 // page_size * page_size
    assert hit(tokens, TIERS[0]) == 0
    assert hit(tokens, TIERS[1]) == 0
    assert hit(tokens, TIERS[0]) == hit(tokens, TIERS[1]) == whole
    changed = [*tokens[:6], 99, *tokens[7:]]
    assert hit(changed, TIERS[0]) == 6 // page_size * page_size
    assert hit([99, *tokens[1:]], TIERS[0]) == 0
    # The same tokens one place later: the same page content after another past is no hit.
    assert hit([98] * page_size + tokens, TIERS[0]) == 0


def test_a_page_is_findable_only_once_computed(make_request):
    """A prompt that is half through its chunks shares only the half that is in the cache."""
    world = World(make_request, num_pages=60, page_size=2, max_num_seqs=8, budget=6)
    prompt = list(range(12))
    world.add(prompt, TIERS[0], 1)
    world.step()
    assert len(world.pages.match_prefix(TIERS[0].digest, prompt)) == 3
    world.step()
    assert len(world.pages.match_prefix(TIERS[0].digest, [*prompt, 1])) == 6
    world.drain(lambda request: 1, limit=10)


def test_the_least_recently_freed_prefix_is_evicted_first(make_request):
    world = World(make_request, num_pages=8, page_size=2, max_num_seqs=8, budget=100)
    for token in (1, 2, 3):
        world.add([token] * 5, TIERS[0], 1)
        world.step()
    assert world.pages.num_free == 8
    world.add([9] * 8, TIERS[0], 1)  # needs four pages: two are free without a prefix in them
    world.step()
    found = [len(world.pages.match_prefix(TIERS[0].digest, [token] * 5)) for token in (1, 2, 3)]
    assert found[2] == 2 and found[0] < 2


class TestBlockManager:
    def test_growing_is_all_or_nothing(self):
        manager, mine, other = BlockManager(4, 4), [], []
        assert manager.grow(mine, 9)
        assert len(mine) == 3
        assert not manager.grow(other, 5)
        assert other == [] and manager.num_free == 1
        assert manager.grow(mine, 12) and len(mine) == 3
        manager.check_integrity([mine])

    def test_counts(self):
        manager, pages = BlockManager(10, 4), []
        assert [manager.num_needed(tokens, 1) for tokens in (0, 4, 5, 12, 13)] == [0, 0, 1, 2, 3]
        manager.grow(pages, 20)
        assert manager.usage == 0.5

    def test_double_free_is_caught(self):
        manager, pages = BlockManager(4, 4), []
        manager.grow(pages, 4)
        again = list(pages)
        manager.free(pages)
        assert pages == []
        with pytest.raises(AssertionError, match="freed twice"):
            manager.free(again)

    @pytest.mark.parametrize("damage", ["leak", "alien", "shared"])
    def test_check_integrity_notices(self, damage):
        manager, pages = BlockManager(4, 4), []
        manager.grow(pages, 8)
        owners = {"leak": [], "alien": [pages, [3]], "shared": [pages, pages]}[damage]
        with pytest.raises(AssertionError, match="page"):
            manager.check_integrity(owners)

    def test_a_shared_page_lives_until_its_last_owner_goes(self):
        manager, first, tokens = BlockManager(6, 2), [], [1, 2, 3, 4, 5]
        manager.grow(first, 5)
        manager.register("root", tokens, first, 0, "root")
        second = manager.match_prefix("root", tokens)
        assert second == first[:2]
        manager.take(second)
        manager.check_integrity([first, second])
        manager.free(first)
        manager.check_integrity([second])
        assert manager.num_free == 4
        assert manager.num_free_without(second) == 4
        manager.free(second)
        assert manager.num_free_without(manager.match_prefix("root", tokens)) == 4

    @settings(max_examples=100)
    @given(seed=st.integers(0, 2**32), page_size=st.integers(1, 3))
    def test_match_is_the_longest_common_prefix_in_whole_pages(self, seed, page_size):
        """Against a naive search over everything that was registered (nothing is evicted here)."""
        rng, manager = random.Random(seed), BlockManager(400, page_size)
        known = []
        for _ in range(12):
            root = rng.choice(["a", "b"])
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 9))]
            limit = (len(tokens) - 1) // page_size
            best = 0
            for other_root, other in known:
                equal = 0
                while equal < min(len(tokens), len(other)) and tokens[equal] == other[equal]:
                    equal += 1
                if other_root == root:
                    best = max(best, min(equal // page_size, limit))
            assert len(manager.match_prefix(root, tokens)) == best
            pages = []
            manager.grow(pages, len(tokens))
            first = rng.randint(0, len(tokens))
            registered = manager.register(root, tokens[:first], pages, 0, root)
            manager.register(root, tokens, pages, *registered)
            known.append((root, tokens))
