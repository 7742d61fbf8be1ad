"""What is done where a request says nothing: sampling values, the limit of an answer, the tokens that end it.

One record, made when a model is loaded, from the operator's options, generation_config.json, config.json, the tokenizer
and the chat template; each value is checked there and nowhere again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb.engine.requests.repetition import RepetitionDetection
from sleb.engine.requests.sampling_params import COUNT_RANGES, NUMBER_RANGES, SamplingParams
from sleb.errors import ConfigError, SlebError
from sleb.fields import Fields, as_integer, read_json, shown, shown_path

if TYPE_CHECKING:
    from sleb.engine.config import EngineConfig
    from sleb.engine.model.architecture import DecoderSpec
    from sleb.engine.text import TextProcessor

logger = logging.getLogger("sleb.engine")

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_NOT_USED_IF_GREEDY = ("temperature", "top_p", "top_k", "min_p")  # a file with do_sample: false
# Fields by which a generation config shapes answers in transformers, and not here.
_IGNORED = (
    "max_new_tokens",
    "min_new_tokens",
    "stop_strings",
    "num_beams",
    "penalty_alpha",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
)
_MAX_ENDS = 1024
_LOOP_SIZE = 64  # tokens, of --end-loops


@dataclass(frozen=True)
class GenerationDefaults:
    """What holds for requests that do not say it themselves. All ids are within the model's vocabulary.

    max_tokens: None: to the end of the context. end_token_ids: each ends an answer. begin_token_id: that of a text.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    repetition_detection: RepetitionDetection | None = None
    end_token_ids: frozenset[int] = frozenset()
    begin_token_id: int | None = None

    def resolve(self, params: SamplingParams) -> SamplingParams:
        """`params` with these values for those that are None."""
        names = (*SAMPLING, "repetition_detection")
        chosen = {name: getattr(self, name) for name in names if getattr(params, name) is None}
        return params.changed(**chosen) if chosen else params


def load_defaults(
    path: Path,
    config: EngineConfig,
    spec: DecoderSpec,
    text: TextProcessor,
    of_alias: Mapping[str, float],
) -> GenerationDefaults:
    """The defaults of the model in the folder `path`; `of_alias`: the sampling values that its alias brings.

    A sampling value is the operator's, else that of the generation config which `config` names, the alias's if that is
    the model's own and has none, else off. Ends are all that the files name; only if none does, what transformers takes
    for the architecture. Raises ModelError naming file and field, ConfigError for a file that the operator named.
    """
    own = _read(path / "generation_config.json")
    chosen = own if config.generation_config == "auto" else Fields({}, "")
    if config.generation_config not in ("auto", "none"):
        chosen = _named(Path(config.generation_config))
    values = (dict(of_alias) if config.generation_config == "auto" else {}) | _sampling_values(chosen)
    values |= {name: given for name in SAMPLING if (given := getattr(config, name)) is not None}
    # The architecture's own stands there where the file has none.
    of_config = Fields({"eos_token_id": list(spec.special_token_ids["eos"])}, path / "config.json")
    stated = "eos_token_id" in _read(path / "config.json")
    ends = set(text.end_token_ids())
    for fields in dict.fromkeys((own, chosen, *([of_config] if stated else ()))):
        ends |= set(_token_ids(fields, "eos_token_id", spec.vocab_size))
    if not ends:
        ends = set(_token_ids(of_config, "eos_token_id", spec.vocab_size))
    begins = _token_ids(own, "bos_token_id", spec.vocab_size)
    return GenerationDefaults(
        **values,
        max_tokens=config.default_max_tokens,
        repetition_detection=RepetitionDetection(_LOOP_SIZE, min_count=config.end_loops)
        if config.end_loops
        else None,
        end_token_ids=frozenset(ends),
        begin_token_id=begins[0] if begins else None,
    )


def _read(file: Path) -> Fields:
    try:
        return read_json(file)
    except FileNotFoundError:
        return Fields({}, file)


def _named(file: Path) -> Fields:
    try:
        return read_json(file, ConfigError)
    except FileNotFoundError:
        raise ConfigError(
            f"--generation-config {shown_path(file)} does not exist; name a JSON file, auto or none"
        ) from None


def _sampling_values(fields: Fields) -> dict[str, Any]:
    """The sampling values that the file gives, each in the range of a request's."""
    ignored = [name for name in _IGNORED if fields.values.get(name) not in (None, False, 0, 1, [], {})]
    if ignored:
        logger.warning("%s: not supported, ignored: %s", shown_path(fields.source), ", ".join(ignored))
    greedy = fields.boolean("do_sample", True) is False
    values: dict[str, Any] = {}
    for name in SAMPLING:
        if name not in fields or (greedy and name in _NOT_USED_IF_GREEDY):
            continue
        try:
            if name in COUNT_RANGES:
                values[name] = fields.integer(name, *COUNT_RANGES[name])
            else:
                low, high, above = NUMBER_RANGES[name]
                values[name] = fields.number(name, low, high, above=above)
        except SlebError as error:
            raise type(error)(
                f"{error}. Mend the file, or leave its values out: --generation-config none"
            ) from None
    return values


def _token_ids(fields: Fields, name: str, vocab_size: int) -> list[int]:
    """One id or a list of them, less those that the model does not have."""
    value = fields.values.get(name)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    ids = [as_integer(each) for each in listed[:_MAX_ENDS]]
    known = [each for each in ids if each is not None and 0 <= each < vocab_size]
    if None in ids or len(listed) > _MAX_ENDS:
        raise fields.wrong(name, f"a token id or a list of at most {_MAX_ENDS} of them")
    for each in ids:
        if each not in known:
            logger.warning(
                "%s: %s %s is no token of the model, which has %d; it is ignored",
                shown_path(fields.source),
                name,
                shown(each),
                vocab_size,
            )
    return known
