"""How the tokens of one request are chosen and when it ends."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from sleb.engine.requests.repetition import RepetitionDetection
from sleb.errors import RequestError

if TYPE_CHECKING:
    from sleb.engine.requests.grammar import GrammarSource

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_CHOICES = 128
MAX_INTEGER = 2**63 - 1  # larger integers of JSON are not exact in every parser

# Field: least and greatest integer.
COUNT_RANGES: dict[str, tuple[int, int]] = {
    "n": (1, MAX_CHOICES),
    "max_tokens": (-1, MAX_INTEGER),
    "min_tokens": (0, MAX_INTEGER),
    "top_k": (-1, MAX_INTEGER),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "seed": (-(2**63), 2**64 - 1),
}
# Field: least and greatest number, and whether the least itself is left out.
NUMBER_RANGES: dict[str, tuple[float, float, bool]] = {
    "temperature": (0.0, 100.0, False),
    "top_p": (0.0, 1.0, False),
    "min_p": (0.0, 1.0, False),
    "presence_penalty": (-2.0, 2.0, False),
    "frequency_penalty": (-2.0, 2.0, False),
    "repetition_penalty": (0.01, 100.0, False),  # logits are divided by it, and must stay finite
}


def is_integer(value: Any) -> bool:
    """Whether `value` is an int and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether `value` is an int or float and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _refuse(name: str, value: object, allowed: str) -> NoReturn:
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    raise RequestError(f"{name} is {shown}; it must be {allowed}", param=name)


@dataclass(frozen=True)
class SamplingParams:
    """Sampling fields under the names of the HTTP contract.

    A sampling field that is None follows the engine's defaults (`sleb.engine.generation`).

    Attributes:
        max_tokens: new tokens at most; None or -1: to the end of the context; 0: score the prompt and stop.
        min_tokens: end-of-sequence, stop ids and stop strings do not end the request before this many new tokens.
        temperature: 0 is greedy, and so is top_p 0. top_k: 0 or -1 is off. top_p, min_p in [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output
            (arXiv 1909.05858); presence_penalty and frequency_penalty subtract, for output tokens only.
        seed: fixes the request's own random numbers, whatever else is in the batch; -1 is none.
        shown_special_ids: special tokens whose text is kept though skip_special_tokens leaves out the others.
        repetition_detection: ends an answer that loops, as "length"; None: as the engine's defaults say.
        grammar: what the output must follow; it then ends as soon as nothing can be added, even below min_tokens.
        logprobs: None for none, else the number of alternatives beside the chosen token. prompt_logprobs likewise.

    Raises RequestError, with `.param`, for a value out of range.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = field(default=())
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    shown_special_ids: Collection[int] = field(default=())
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    repetition_detection: RepetitionDetection | None = None
    grammar: GrammarSource | None = None

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_numbers()
        self._check_stops()
        self._check_bias()
        self._settle()

    def _settle(self) -> None:
        # One way to say a thing: of the values that llama.cpp and vLLM have for it too.
        if self.max_tokens == -1:
            object.__setattr__(self, "max_tokens", None)
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        if self.top_p == 0:
            object.__setattr__(self, "top_p", 1.0)
            object.__setattr__(self, "temperature", 0.0)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def for_choice(self, number: int) -> SamplingParams:
        """The parameters of one of the `n` answers to a prompt: a seed gives each its own random numbers."""
        seed = None if self.seed is None else (self.seed + number) % 2**64
        return self.changed(n=1, seed=self.seed if number == 0 else seed)

    def changed(self, **values: Any) -> SamplingParams:
        """A copy with values that are known to be in range: nothing is checked a second time."""
        made = copy(self)
        for name, value in values.items():
            object.__setattr__(made, name, value)
        made._settle()
        return made

    def _check_counts(self) -> None:
        for name, (low, high) in COUNT_RANGES.items():
            value = getattr(self, name)
            if value is None and name not in ("n", "min_tokens"):
                continue
            if not is_integer(value) or not low <= value <= high:
                too_large = is_integer(value) and value > high
                limit = f", at most {high}" if too_large or high != MAX_INTEGER else ""
                _refuse(name, value, f"an integer of at least {low}{limit}")
        if self.max_tokens not in (None, -1) and self.min_tokens > (self.max_tokens or 0):
            _refuse("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")

    def _check_numbers(self) -> None:
        for name, (low, high, above) in NUMBER_RANGES.items():
            value = getattr(self, name)
            if value is None and name in ("temperature", "top_p", "min_p", "repetition_penalty"):
                continue
            if not is_number(value) or not low <= value <= high or (above and value == low):
                _refuse(name, value, f"a number{' above 0' if above else ''} from {low:g} to {high:g}")

    def _check_stops(self) -> None:
        strings = self.stop_strings
        if len(strings) > MAX_STOP_STRINGS:
            _refuse("stop", f"{len(strings)} strings", f"at most {MAX_STOP_STRINGS} strings")
        for string in strings:
            if not _is_string(string) or not 0 < len(string) <= MAX_STOP_LENGTH:
                _refuse("stop", string, f"strings of 1 to {MAX_STOP_LENGTH} characters")
        for token_id in self.stop_token_ids:
            if not is_integer(token_id) or token_id < 0:
                _refuse("stop_token_ids", token_id, "token ids, integers of at least 0")

    def _check_bias(self) -> None:
        for token_id, bias in (self.logit_bias or {}).items():
            if not is_integer(token_id) or token_id < 0:
                _refuse("logit_bias", token_id, "a map from token ids to numbers")
            if not is_number(bias) or not -100 <= bias <= 100:
                _refuse("logit_bias", bias, "a map to numbers from -100 to 100")
