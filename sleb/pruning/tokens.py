"""The tokens of a search: calibration and held-out windows, with what they need of the model."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from sleb.errors import ConfigError
from sleb.pruning.calibration import (
    DEFAULT_WINDOWS,
    GENERATED,
    Calibration,
    Render,
    adds_special_tokens,
    calibration_windows,
    is_generated,
)
from sleb.pruning.options import TextOptions

if TYPE_CHECKING:
    from sleb.engine.llm import LLM
    from sleb.engine.outputs import Output

DEFAULT_SEQLEN = 2048
# Templates that write today's date would give other tokens tomorrow. This is the date that Llama 3's fall back to.
_DATE = datetime(2024, 7, 26)
_DATE_CODES = "aAbBdmyYHIMSpj"


class TokenizedModel(Protocol):
    """What is asked of the model that is searched; one with a `TextProcessor` as `text` can render conversations, and
    tells which token windows begin with."""

    @property
    def model_name(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def max_length(self) -> int | None: ...


def gather_tokens(
    model: object,
    scorer: TokenizedModel,
    options: TextOptions,
    *,
    note: Callable[[str], None],
    on_generate: Callable[[float], None],
) -> tuple[Calibration, list[Calibration]]:
    """The calibration of `options`, and as many windows of each of its held-out texts, or all that it gives.

    Held-out texts that the model writes have the next seeds. on_generate gets the share of a text that the model has
    written. Raises ConfigError or SlebError.
    """
    gatherer = _Gatherer(model, scorer, options, on_generate)
    tokens = gatherer.gather(options.calibration, options.sampler, options.windows, options.seed)
    if tokens.note:
        note(tokens.note)
    held_out: list[Calibration] = []
    for number, text in enumerate(options.held_out, 1):
        seed = (options.seed or 0) + number if is_generated(text) else None
        held_out.append(gatherer.gather(text, "packed", None, seed, most=len(tokens.windows)))
        found, asked = held_out[-1].record, tokens.record
        if (found.source, found.token_hash) == (asked.source, asked.token_hash):
            note(f"the held-out text is the calibration text {found.source}: it tells nothing new")
    return tokens, held_out


class _Gatherer:
    """Windows for one search; the engine that writes text is loaded once, when it is needed."""

    def __init__(
        self,
        model: object,
        scorer: TokenizedModel,
        options: TextOptions,
        on_generate: Callable[[float], None],
    ) -> None:
        self._model, self._scorer, self._options = model, scorer, options
        self._on_generate = on_generate
        context = scorer.max_length
        self._seqlen = options.seqlen or min(DEFAULT_SEQLEN, context or DEFAULT_SEQLEN)
        if context is not None and self._seqlen > context:
            raise ConfigError(
                f"seqlen {self._seqlen} is longer than the context of {scorer.model_name}: {context} at most"
            )
        if scorer.tokenizer is None:
            raise ConfigError(
                f"{scorer.model_name} has no tokenizer: add its tokenizer.json to the model's folder"
            )
        # A tokenizer file may carry a limit that would silently cut the calibration text.
        scorer.tokenizer.no_truncation()
        scorer.tokenizer.no_padding()

    def gather(
        self,
        source: str | Path,
        sampler: str,
        windows: int | None,
        seed: int | None,
        most: int = DEFAULT_WINDOWS,
    ) -> Calibration:
        special = adds_special_tokens(sampler)
        tokenizer = self._scorer.tokenizer

        def encode(text: str) -> Sequence[int]:
            return cast(Sequence[int], tokenizer.encode(text, add_special_tokens=special).ids)

        return calibration_windows(
            source,
            encode,
            sampler=sampler,
            seqlen=self._seqlen,
            windows=windows,
            seed=seed,
            most=most,
            render=self._render,
            generate=self._writer.write if is_generated(source) else None,
            on_generate=self._on_generate,
            start=getattr(getattr(self._scorer, "text", None), "window_start", None),
        )

    @cached_property
    def _render(self) -> Render | None:
        text = getattr(self._scorer, "text", None)
        if text is None or text.chat_template is None:
            return None
        text = copy.copy(text)
        text.chat_template = _with_one_date(text.chat_template)

        def render(messages: Sequence[Mapping[str, Any]]) -> Sequence[int]:
            return cast(Sequence[int], text.render_chat(messages, add_generation_prompt=False))

        return render

    @cached_property
    def _writer(self) -> _Writer:
        from sleb.engine.llm import LLM

        if not isinstance(self._model, str | os.PathLike):
            raise ConfigError(
                f"calibration {GENERATED} can only be written by a model given by name: pass its folder or id"
            )
        llm = LLM(
            os.fspath(self._model),
            "none",
            (0,),
            dtype=self._options.dtype,
            device=self._options.device,
            max_model_len=self._seqlen,
        )
        return _Writer(llm)


def _with_one_date(template: str) -> str:
    """The chat template with `_DATE` for today, by a macro that hides transformers' function of that name."""
    if "strftime_now" not in template:
        return template
    replaced = "".join(f" | replace('%{code}', '{_DATE.strftime('%' + code)}')" for code in _DATE_CODES)
    # The newline belongs to the block before it, so whatever the template begins with stays at the start of a line.
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"


class _Writer:
    """Documents sampled from the dense model at temperature 1: `sleb.pruning.calibration.Generate`."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        end, begin = self._named("eos_token"), self._named("bos_token")
        self._end = min(llm.engine.eos_token_ids, default=None) if end is None else end
        if begin is None:  # some tokenizers leave it to the generation config
            begin = llm.engine.defaults.begin_token_id
            begin = self._end if begin is None else begin
        self._begin = begin

    def write(
        self, seeds: Sequence[int], max_tokens: int, on_tokens: Callable[[int], None]
    ) -> list[list[int]]:
        """A document a seed.

        Without a beginning-of-text or end-of-text token a document begins with a token drawn from all, and has it.
        """
        from sleb.engine.requests.sampling_params import SamplingParams

        given = [[self._random(seed) if self._begin is None else self._begin] for seed in seeds]
        kept = given if self._begin is None else [[] for _ in seeds]
        params = [  # every filter off, whatever the model's generation config has
            SamplingParams(
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                repetition_penalty=1.0,
                max_tokens=max_tokens - len(tokens),
                seed=seed,
            )
            for seed, tokens in zip(seeds, kept, strict=True)
        ]
        outputs = self._llm.generate(given, params, depth=0, on_progress=on_tokens)
        return [
            [*tokens, *output.check().token_ids, *self._missing_end(output)]
            for tokens, output in zip(kept, outputs, strict=True)
        ]

    def _missing_end(self, output: Output) -> list[int]:
        return [] if output.finish_reason == "stop" or self._end is None else [self._end]

    def _random(self, seed: int) -> int:
        return random.Random(seed).randrange(self._llm.engine.spec.vocab_size)

    def _named(self, name: str) -> int | None:
        """The id of the token that the tokenizer calls `name`."""
        text = self._llm.engine.text
        token = text.named_tokens.get(name)
        return None if token is None or text.tokenizer is None else text.tokenizer.token_to_id(token)
