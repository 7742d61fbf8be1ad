"""The tokenizer of a GGUF file, rebuilt from the vocabulary, merges and rules that the file states.

transformers can build one too, but it knows the splitting rules of some vocabularies only and takes plain GPT-2's
for the rest (SmolLM's among them, which splits digits one by one), and it reads a sentencepiece vocabulary with
rules for spaces that neither the published tokenizers nor llama.cpp follow. Ids then differ from those that the
model was trained on, so both kinds are built here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from sleb.errors import ModelError
from sleb.fields import shown, shown_path, shown_text
from sleb.models.gguf.vocabulary import BYTE, CONTROL, UNKNOWN, USER_DEFINED, Vocabulary

_SPACE = "\u2581"  # sentencepiece's stand-in for a space
# Phi-3's control tokens swallow the space behind them, these excepted; only its published tokenizer says so.
_KEEPS_SPACE = {"<unk>", "<s>", "<|endoftext|>"}

_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASH_END = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SUFFIX}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}{_END}"
_QWEN2 = rf"{_SUFFIX}|{_LEAD}\p{{L}}+|\p{{N}}{_END}"
_TEKKEN = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}{_SLASH_END}"
_GPT4O = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_SUFFIX}?|{_LEAD}{_UPPER}+{_LOWER}*{_SUFFIX}?|\p{{N}}{{1,3}}{_SLASH_END}"
)
_SEED = rf"{_SUFFIX}|{_LEAD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_BLANKS = "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
_JAIS2 = (
    rf"{_SUFFIX}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_BLANKS}|\s{{1}}"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class SplitRule:
    """How text is cut before merging: each pattern cuts what the patterns before it left, keeping every piece.

    `whole_words`: a piece that is itself in the vocabulary is one token, merges or not. `add_bos`: what a file
    that does not say so means. `nfc`: the published tokenizer composes characters first.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False
    nfc: bool = False


BY_RULE: dict[SplitRule, tuple[str, ...]] = {
    SplitRule((_GPT2,)): ("gpt-2", "phi-2", "olmo", "mpt", "exaone4"),
    SplitRule((r"\p{N}", _GPT2)): (
        "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
    ),
    SplitRule((_LLAMA3,), whole_words=True, add_bos=True): (
        "llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral",
    ),
    SplitRule((_LLAMA3,), whole_words=True): ("glm4",),
    SplitRule((_LLAMA3,)): ("smaug-bpe", "dbrx", "chatglm-bpe"),
    SplitRule((_QWEN2,), nfc=True): ("qwen2", "deepseek-r1-qwen", "megrez"),
    SplitRule((_QWEN2,)): ("stablelm2", "hunyuan"),
    SplitRule((_SEED,)): ("seed-coder",),
    SplitRule((_JAIS2,)): ("jais-2",),
    SplitRule((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)): ("deepseek-v3", "hunyuan-dense"),
    SplitRule((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")): ("falcon",),
    SplitRule((_TEKKEN,), whole_words=True, add_bos=True): ("tekken",),
    SplitRule((_GPT4O,)): ("gpt-4o",),
    SplitRule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")): ("default",),
}  # fmt: skip
# From llama.cpp, src/llama-vocab.cpp (the names and what they switch) and the models' own tokenizer.json.
SPLIT_RULES = {name: rule for rule, names in BY_RULE.items() for name in names}


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer of a file's vocabulary. Raises ModelError for a splitting rule that is not known here."""
    try:
        return _byte_level(vocabulary) if vocabulary.model == "gpt2" else _sentencepiece(vocabulary)
    except ModelError:
        raise
    except Exception as error:  # the Rust library raises bare Exception
        raise ModelError(
            f"{shown_path(vocabulary.source)}: its vocabulary cannot be made a tokenizer ({shown_text(str(error))})"
        ) from error


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    rule = _split_rule(vocabulary)
    tokenizer = Tokenizer(BPE(vocabulary.index, vocabulary.merges, ignore_merges=rule.whole_words))
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer(rule)
    tokenizer.decoder = decoders.ByteLevel()
    byte_level = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = processors.Sequence([byte_level, *_framing(vocabulary, rule.add_bos)])
    _add_fixed_tokens(tokenizer, vocabulary)
    return tokenizer


def pre_tokenizer(rule: SplitRule) -> pre_tokenizers.PreTokenizer:
    """What cuts text by `rule` and writes bytes as characters."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, alphabet])


def _split_rule(vocabulary: Vocabulary) -> SplitRule:
    name = vocabulary.pre
    rule = SPLIT_RULES.get(name) if name is not None else None
    if rule is None:
        stated = "it names no pre-tokenizer" if name is None else f"pre-tokenizer {shown(name)} is not known"
        raise ModelError(
            f"{shown_path(vocabulary.source)}: {stated} (tokenizer.ggml.pre), so its token ids would be guesses; "
            f"known: {', '.join(sorted(SPLIT_RULES))}. Use the model's Hugging Face folder instead"
        )
    return rule


def _framing(vocabulary: Vocabulary, add_bos: bool) -> list[Any]:
    """Puts the beginning and end tokens around a text, if the file asks for them."""
    single, special = ["$A"], []
    for name, stated, default in (("bos", vocabulary.add_bos, add_bos), ("eos", vocabulary.add_eos, False)):
        index = vocabulary.ids.get(name)
        if index is not None and (default if stated is None else stated):
            token = vocabulary.tokens[index]
            single.insert(0 if name == "bos" else len(single), token)
            special.append((token, index))
    if not special:
        return []
    pair = [*single, *("$B:1" if part == "$A" else f"{part}:1" for part in single)]
    return [processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)]


def _add_fixed_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Control and user-defined tokens match whole in any text; only the former vanish from decoded text."""
    keeps_space = vocabulary.model == "gpt2" or vocabulary.architecture != "phi3"
    typed = list(zip(vocabulary.tokens, vocabulary.kinds, strict=False))
    for wanted, add in ((CONTROL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens)):
        added = []
        for token in (token for token, kind in typed if kind == wanted):
            strips = not keeps_space and wanted == CONTROL and token not in _KEEPS_SPACE
            added.append(AddedToken(token, normalized=False, special=wanted == CONTROL, rstrip=strips))
        add(added)


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    """Sentencepiece BPE: no splits, spaces written out, bytes for what the vocabulary lacks.

    Sentencepiece always joins the neighbours whose union scores best, so merges ranked by score do the same.
    """
    index = vocabulary.index
    joined = [
        (-score, token)
        for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.kinds, strict=True)
        if kind not in (UNKNOWN, CONTROL, BYTE)
    ]
    merges = [
        (token[:cut], token[cut:])
        for _, token in sorted(joined, key=lambda scored: scored[0])
        for cut in range(1, len(token))
        if token[:cut] in index and token[cut:] in index
    ]
    unknown = vocabulary.tokens[vocabulary.ids["unknown"]]
    tokenizer = Tokenizer(BPE(index, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    leading = vocabulary.add_space_prefix
    written = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), written]) if leading else written
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if leading else [])])
    if framing := _framing(vocabulary, add_bos=True):
        tokenizer.post_processor = framing[0]
    _add_fixed_tokens(tokenizer, vocabulary)
    return tokenizer


def tokenizer_config(vocabulary: Vocabulary, max_length: int) -> dict[str, Any]:
    """The contents of tokenizer_config.json: named tokens, chat template, longest input in tokens."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if key in vocabulary.ids:
            config[f"{name}_token"] = vocabulary.tokens[vocabulary.ids[key]]
    templates = {"default": vocabulary.template, "tool_use": vocabulary.tool_template}
    given = [{"name": name, "template": text} for name, text in templates.items() if text]
    if given:
        config["chat_template"] = given if vocabulary.tool_template else vocabulary.template
    return config


def write_tokenizer(vocabulary: Vocabulary, folder: Path, max_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `folder`. Raises ModelError as `build_tokenizer`."""
    build_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    config = tokenizer_config(vocabulary, max_length)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
