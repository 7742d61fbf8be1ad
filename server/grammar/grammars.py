"""Grammars that answers must follow, compiled by llguidance and kept for the next request.

A matcher's masks are filled by the engine's thread; compiling happens in threads of its own, off the event loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from sleb.errors import ModelError, RequestError
from sleb.server.errors import OverloadedError
from sleb.server.grammar.grammar_spec import GrammarSpec, Part
from sleb.server.grammar.notation import GrammarError, as_llguidance, in_words

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from sleb.engine.requests.grammar import Grammar, GrammarSource, Mask
    from sleb.engine.served_model import ServedModel

logger = logging.getLogger("sleb.server")

MAX_GRAMMAR_LENGTH = 256 * 1024  # characters of all parts of a grammar
MAX_SCHEMA_OBJECTS = 5000  # of all its JSON schemas: up to 9 kB each, compiled
_MAX_KEPT = 64
_MAX_KEPT_LENGTH = 2 * MAX_GRAMMAR_LENGTH
_MAX_AT_ONCE = 2
_SECONDS_TO_COMPILE = 10.0
# llguidance walks chains of rules by recursion; a request must not be able to overflow a stack. Only touched pages
# of it take memory.
_STACK_BYTES = 512 * 2**20
_MAX_ITEMS = 20_000  # that a parser may look at before one token: a millisecond or two
_NUM_TRIED = 4  # tokens


class CompiledGrammar:
    """A grammar source for the engine. `first`: the mask of every answer's first token, once it is known."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self.first: Mask | None = None

    def start(self) -> Grammar:
        """The state of a new answer, a copy that costs microseconds."""
        return _State(self, self._matcher.deep_copy())


class _State:
    def __init__(self, source: CompiledGrammar, matcher: Any) -> None:
        self._source: CompiledGrammar | None = source  # until a token is accepted
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        return bool(self._matcher.is_stopped())

    def fill(self, mask: Mask) -> None:
        if self._source is not None and self._source.first is not None:
            mask[:] = self._source.first
            return
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():  # only its size can make a mask fail
            raise RequestError(
                "what the answer must follow takes too much to follow further, simplify it: "
                f"{in_words(self._matcher.get_error())}",
                code="grammar_too_complex",
            )
        if self._source is not None:
            self._source.first = mask.copy()

    def accept(self, token_id: int) -> None:
        self._source = None
        self._matcher.consume_token(token_id)
        if self._matcher.is_error():
            raise RuntimeError(in_words(self._matcher.get_error()))


class GrammarCompiler:
    """Compiles for one tokenizer; all methods belong to the event loop."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        # A model may end in a token of its padding, of which the tokenizer has no text, and llguidance no entry.
        known = [each for each in eos_token_ids if tokenizer is not None and tokenizer.id_to_token(each)]
        self._eos = sorted(known)
        self._table: Any = None
        self._table_lock = threading.Lock()
        self._kept: OrderedDict[tuple[Part, ...], CompiledGrammar] = OrderedDict()
        self._under_way: dict[tuple[Part, ...], asyncio.Future[CompiledGrammar]] = {}
        self._waiting: Counter[tuple[Part, ...]] = Counter()
        self._begun: set[tuple[Part, ...]] = set()
        self._turns = asyncio.Semaphore(_MAX_AT_ONCE)

    def prepare(self) -> None:
        """Makes what all grammars share, which holds the interpreter's lock for up to a second, and 30 MB."""
        if self._tokenizer is not None:
            self._token_table()

    def kept(self, parts: tuple[Part, ...]) -> CompiledGrammar | None:
        """A grammar from memory, by its parts; None if it has to be compiled."""
        found = self._kept.get(parts)
        if found is not None:
            self._kept.move_to_end(parts)
        return found

    async def compile(self, spec: GrammarSpec) -> GrammarSource:
        """The grammar, from memory if it was there before.

        Raises RequestError for one that llguidance refuses (its own words), or that is too large or takes too long,
        OverloadedError where others took so long that it was not begun.
        """
        if self._tokenizer is None:
            raise RequestError("this model has no tokenizer, which grammars need", param=spec.param)
        length = _length(spec.parts)
        if length > MAX_GRAMMAR_LENGTH:
            raise RequestError(
                f"{spec.param} is too large: {length} characters, of at most {MAX_GRAMMAR_LENGTH}",
                param=spec.param,
            )
        num_objects = sum(part.text.count("{") for part in spec.parts if part.kind in ("json", "arguments"))
        if num_objects > MAX_SCHEMA_OBJECTS:
            raise RequestError(
                f"{spec.param} is too large: {num_objects} objects in JSON schemas, of at most {MAX_SCHEMA_OBJECTS}",
                param=spec.param,
            )
        if (kept := self.kept(spec.parts)) is not None:
            return kept
        if spec.parts not in self._under_way:
            task = asyncio.ensure_future(self._compile(spec.parts))
            task.add_done_callback(lambda done: self._forget(spec.parts, done))
            self._under_way[spec.parts] = task
        work = self._under_way[spec.parts]
        self._waiting[spec.parts] += 1
        try:
            async with asyncio.timeout(_SECONDS_TO_COMPILE):
                return await asyncio.shield(work)
        except TimeoutError:
            if spec.parts not in self._begun:
                raise OverloadedError(
                    "other requests' grammars are being compiled; try again later"
                ) from None
            raise RequestError(
                f"{spec.param} takes longer than {_SECONDS_TO_COMPILE:g} s to compile; simplify it",
                param=spec.param,
            ) from None
        except GrammarError as error:
            raise RequestError(f"{spec.fields} cannot be used: {error}", param=spec.param) from None
        finally:
            self._waiting[spec.parts] -= 1
            if not self._waiting[spec.parts]:
                del self._waiting[spec.parts]
                if spec.parts not in self._begun and not work.done():
                    work.cancel()  # a thread cannot be stopped, what waits for one can
                    self._under_way.pop(spec.parts, None)

    async def _compile(self, parts: tuple[Part, ...]) -> CompiledGrammar:
        async with self._turns:
            self._begun.add(parts)
            compiled = await asyncio.wrap_future(_run_deep(lambda: self._build(parts)))
        self._kept[parts] = compiled
        while len(self._kept) > _MAX_KEPT or _length(*self._kept) > _MAX_KEPT_LENGTH:
            self._kept.popitem(last=False)
        return compiled

    def _forget(self, parts: tuple[Part, ...], done: asyncio.Future[CompiledGrammar]) -> None:
        if self._under_way.get(parts) is done:
            del self._under_way[parts]
            self._begun.discard(parts)
        if not done.cancelled():
            done.exception()  # looked at, should nobody wait any more

    def _build(self, parts: tuple[Part, ...]) -> CompiledGrammar:
        """Called by a thread of its own."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(step_max_items=_MAX_ITEMS, verbose_errors=False)
        grammars = [as_llguidance(LLMatcher, part) | {"name": part.name} for part in parts]
        matcher = LLMatcher(
            self._token_table(), json.dumps({"grammars": grammars}), log_level=0, limits=limits
        )
        _try(matcher.deep_copy())
        return CompiledGrammar(matcher)

    def _token_table(self) -> Any:
        from llguidance import LLTokenizer

        with self._table_lock:
            if self._table is None:
                assert self._tokenizer is not None
                try:
                    self._table = LLTokenizer(
                        self._tokenizer.to_str(), n_vocab=self._vocab_size, eos_token=self._eos or None
                    )
                except ValueError as error:  # no fault of the request's
                    raise ModelError(
                        f"llguidance cannot use this model's tokenizer: {in_words(str(error))}"
                    ) from None
            return self._table


_compilers: WeakKeyDictionary[ServedModel, GrammarCompiler] = WeakKeyDictionary()


def compiler_for(model: ServedModel) -> GrammarCompiler:
    """The compiler of a model, made when it is first asked for."""
    compiler = _compilers.get(model)
    if compiler is None:
        compiler = GrammarCompiler(model.tokenizer, model.spec.vocab_size, model.eos_token_ids)
        _compilers[model] = compiler
    return compiler


def _length(*specs: tuple[Part, ...]) -> int:
    return sum(len(part.text) for parts in specs for part in parts)


def _try(matcher: Any) -> None:
    """Follows a grammar for a few tokens: most that are too much for a mask show it at once.

    Raises GrammarError, in llguidance's words.
    """
    for _ in range(_NUM_TRIED):
        if matcher.is_error():
            raise GrammarError(in_words(matcher.get_error()))
        if matcher.is_stopped():
            return
        words = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.flatnonzero(np.unpackbits(words, bitorder="little"))
        if len(allowed):
            matcher.consume_token(int(allowed[0]))


def _run_deep(function: Callable[[], CompiledGrammar]) -> Future[CompiledGrammar]:
    """The result of `function`, called by a thread with a large stack."""
    future: Future[CompiledGrammar] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
        except BaseException as error:  # a panic inside llguidance
            future.set_exception(GrammarError(in_words(str(error))))

    before = threading.stack_size(_STACK_BYTES)
    try:
        threading.Thread(target=work, name="sleb-grammar", daemon=True).start()
    finally:
        threading.stack_size(before)
    return future
