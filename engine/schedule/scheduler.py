"""Which requests run in the next step, and how many tokens of each. Plain Python, no tensors."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator
from operator import attrgetter

from sleb.engine.requests.request import Request
from sleb.engine.schedule.block_manager import BlockManager
from sleb.engine.schedule.step import ScheduledRow, Step


class Scheduler:
    """Plans steps under one token budget.

    Every request tries to catch up `num_computed` with `len(tokens)`. Running requests come first, in order of
    admission; what is left of the budget admits waiting ones, first come first served. Chunked prefill, prefix
    hits and resumption after preemption are nothing special: they are other starting values of num_computed.
    When pages run out, the latest admitted of the running gives its pages back and waits to be recomputed.

    A model with other rotary frequencies past its original context has steps of short sequences and steps of long
    ones, in turns: `short_context` is the length of the former. Who outgrows it is computed anew: all its keys change.

    It must be possible to hold one request of the longest allowed length alone, or nothing would ever finish:
    the engine limits max_model_len to the pages there are.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        short_context: int | None = None,
    ) -> None:
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.short_context = short_context
        self._long_turn = False
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self._free_rows = list(reversed(range(max_num_seqs)))  # of a page table on the executor's device
        self.num_preemptions = 0

    @property
    def requests(self) -> Iterator[Request]:
        """All live requests."""
        yield from self.running
        yield from self.waiting

    def add(self, request: Request) -> None:
        """Puts a new request at the end of the queue."""
        self.waiting.append(request)

    def schedule(self) -> Step:
        """The next step; its rows are empty when there is nothing to do."""
        rows: list[ScheduledRow] = []
        budget, page_size = self.max_num_batched_tokens, self.block_manager.page_size
        preempted = False
        if self.short_context is not None:
            preempted = self._outgrow()
            self._take_turn()
        for request in list(self.running):
            if budget == 0:
                break
            if preempted and request not in self.running:  # for one before it
                continue
            if request.long_context != self._long_turn:
                continue
            num_tokens = min(request.num_missing, budget)
            if num_tokens == 0:  # its last token is on its way
                continue
            start = request.num_computed
            if start + num_tokens > len(request.pages) * page_size:
                preempted |= self._make_room(request, num_tokens)
                if preempted and request not in self.running:
                    continue
            rows.append(ScheduledRow(request, start, num_tokens))
            budget -= num_tokens
        if not preempted:
            rows.extend(self._admit(budget))
        return Step(sorted(rows, key=attrgetter("request.tier.depth")))

    def remove(self, request: Request) -> None:
        """Takes a finished or aborted request out and frees its pages."""
        self._release(request)
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def launched(self, rows: Iterable[ScheduledRow]) -> None:
        """Records that the rows' tokens will be in the cache for whatever is launched from now on."""
        for row in rows:
            row.request.num_computed += row.num_tokens
            row.request.num_pending += row.chooses

    def commit(self, rows: Iterable[ScheduledRow]) -> None:
        """Makes the rows' full pages findable, once all their tokens are known."""
        page_size = self.block_manager.page_size
        for row in rows:
            request = row.request
            if not request.pages:  # finished, dropped or preempted while the step was computed
                continue
            next_full = (request.num_registered_pages + 1) * page_size
            if len(request.tokens) < next_full or request.num_computed < next_full:
                continue
            root = self._root(request)
            request.num_registered_pages, request.last_content = self.block_manager.register(
                root,
                request.tokens[: request.num_computed],
                request.pages,
                request.num_registered_pages,
                root if request.last_content is None else request.last_content,
            )

    def check_integrity(self) -> None:
        """Asserts page accounting and that no request is in two places or holds pages while it waits."""
        self.block_manager.check_integrity(request.pages for request in self.requests)
        live = list(self.requests)
        assert len({id(request) for request in live}) == len(live), "a request is listed twice"
        assert not any(request.pages for request in self.waiting), "a waiting request holds pages"
        assert len(self.running) <= self.max_num_seqs, "too many requests run"
        table_rows = Counter([*(request.table_row for request in self.running), *self._free_rows])
        assert table_rows == Counter(range(self.max_num_seqs)), "rows of the page table are lost or shared"
        for request in self.running:
            held = len(request.pages) * self.block_manager.page_size
            assert request.num_computed <= min(held, len(request.tokens) + request.num_pending), (
                f"{request.request_id} is past its pages"
            )

    def _is_long(self, request: Request) -> bool:
        return (
            self.short_context is not None and len(request.tokens) + request.num_pending > self.short_context
        )

    def _outgrow(self) -> bool:
        """Sends those that have outgrown the short context back to be computed anew; whether there were any."""
        grown = [each for each in self.running if self._is_long(each) and not each.long_context]
        grown = [each for each in grown if each.num_missing]  # others are about to end
        for request in grown:
            self._preempt(request)
        return bool(grown)

    def _take_turn(self) -> None:
        """Chooses the sequences of this step, where there are short and long ones the kind that was not last."""
        kinds = {request.long_context for request in self.running}
        if self.waiting:
            kinds.add(self._is_long(self.waiting[0]))
        self._long_turn = not self._long_turn if len(kinds) > 1 else True in kinds

    @staticmethod
    def _root(request: Request) -> Hashable:
        """What a known prefix begins with: the same tokens have other K at other depths, and past the short context."""
        return (request.tier.digest, "long") if request.long_context else request.tier.digest

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Grows the request's pages, preempting the latest admitted as needed, in the end the request itself."""
        preempted = False
        while not self.block_manager.grow(request.pages, request.num_computed + num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            preempted = True
            if victim is request:
                break
        return preempted

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.reset()
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _release(self, request: Request) -> None:
        """Frees the request's pages, and its row of the page table."""
        self.block_manager.free(request.pages)
        if request.table_row is not None:
            self._free_rows.append(request.table_row)
            request.table_row = None

    def _admit(self, budget: int) -> Iterator[ScheduledRow]:
        forks: list[Request] = []  # whose parents are not done with the prompt: they hold up nobody
        try:
            yield from self._admit_ready(budget, forks)
        finally:
            self.waiting.extendleft(reversed(forks))

    def _admit_ready(self, budget: int, forks: list[Request]) -> Iterator[ScheduledRow]:
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if request.parent is not None and not self._may_fork(request, request.parent):
                forks.append(self.waiting.popleft())
                continue
            request.long_context = self._is_long(request)
            if request.long_context != self._long_turn:
                return
            hit = self._known_pages(request)
            num_computed = len(hit) * self.block_manager.page_size
            num_tokens = min(len(request.tokens) - num_computed, budget)
            needed = self.block_manager.num_needed(num_computed + num_tokens, len(hit))
            if needed > self.block_manager.num_free_without(hit):
                return
            self.waiting.popleft()
            request.parent = None
            self.block_manager.take(hit)
            request.pages.extend(hit)
            self.block_manager.grow(request.pages, num_computed + num_tokens)
            request.num_computed = num_computed
            request.table_row = self._free_rows.pop()
            if request.timings.first_scheduled is None:
                request.num_cached_tokens = num_computed
            self.running.append(request)
            yield ScheduledRow(request, num_computed, num_tokens)
            budget -= num_tokens

    @staticmethod
    def _may_fork(request: Request, parent: Request) -> bool:
        """Whether the parent's pages hold the prompt, or never will."""
        return parent.finish_reason is not None or parent.num_computed >= request.num_prompt_tokens

    def _known_pages(self, request: Request) -> list[int]:
        """Pages that hold the beginning of the request already: its parent's, or those of the prefix cache.

        At least one token is left to compute, whose logits are wanted.
        """
        if request.wants_prompt_logprobs:
            return []
        hit = self.block_manager.match_prefix(self._root(request), request.tokens)
        parent = request.parent
        if parent is None or not parent.pages or parent.long_context != request.long_context:
            return hit
        num_full = (request.num_prompt_tokens - 1) // self.block_manager.page_size
        return hit if len(hit) >= num_full else parent.pages[:num_full]
