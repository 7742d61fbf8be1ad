"""The tokenizer of a GGUF file, rebuilt from the vocabulary, merges and rules that the file states.

transformers can build one too, but it knows the splitting rules of some vocabularies only and takes plain GPT-2's
for the rest (SmolLM's among them, which splits digits one by one), and it reads a sentencepiece vocabulary with
rules for spaces that neither the published tokenizers nor llama.cpp follow. Ids then differ from those that the
model was trained on, so both kinds are built here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from sleb.errors import ModelError

# The kinds in `tokenizer.ggml.token_type`: text that is always one token, shown to people or not.
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
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


_BY_RULE: dict[SplitRule, tuple[str, ...]] = {
    SplitRule((_GPT2,)): ("gpt-2", "phi-2", "olmo", "mpt"),
    SplitRule((r"\p{N}", _GPT2)): (
        "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva",
    ),
    SplitRule((_LLAMA3,), whole_words=True, add_bos=True): (
        "llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral",
    ),
    SplitRule((_LLAMA3,)): ("smaug-bpe", "dbrx"),
    SplitRule((_QWEN2,), nfc=True): ("qwen2", "deepseek-r1-qwen", "megrez"),
    SplitRule((_QWEN2,)): ("stablelm2",),
    SplitRule((_TEKKEN,), whole_words=True, add_bos=True): ("tekken",),
    SplitRule((_GPT4O,)): ("gpt-4o",),
    SplitRule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")): ("default",),
}  # fmt: skip
# From llama.cpp, src/llama-vocab.cpp (the names and what they switch) and the models' own tokenizer.json.
SPLIT_RULES = {name: rule for rule, names in _BY_RULE.items() for name in names}


def build_tokenizer(metadata: Mapping[str, Any], source: Path) -> Tokenizer:
    """The tokenizer that `metadata`, the key-value part of the GGUF file `source`, describes.

    Raises ModelError for a vocabulary or a splitting rule that is not known here, or one that contradicts itself.
    """
    kind = metadata.get("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            return _byte_level(metadata, source)
        if kind == "llama":
            return _sentencepiece(metadata, source)
    except ModelError:
        raise
    except Exception as error:  # the Rust library raises bare Exception
        raise ModelError(f"{source}: its vocabulary cannot be made a tokenizer ({error})") from error
    raise ModelError(
        f"{source}: tokenizer {kind!r} is not supported; supported: gpt2 (byte-level BPE), llama (sentencepiece)"
    )


def _byte_level(metadata: Mapping[str, Any], source: Path) -> Tokenizer:
    rule = _split_rule(metadata, source)
    vocabulary = _vocabulary(metadata, source)
    merges = [_pair(merge) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=rule.whole_words))
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, alphabet])
    tokenizer.decoder = decoders.ByteLevel()
    byte_level = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = processors.Sequence([byte_level, *_framing(metadata, rule.add_bos)])
    _add_fixed_tokens(tokenizer, metadata)
    return tokenizer


def _vocabulary(metadata: Mapping[str, Any], source: Path) -> dict[str, int]:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ModelError(f"{source}: its vocabulary names {len(tokens) - len(vocabulary)} tokens twice")
    return vocabulary


def _split_rule(metadata: Mapping[str, Any], source: Path) -> SplitRule:
    name = metadata.get("tokenizer.ggml.pre")
    rule = SPLIT_RULES.get(name) if isinstance(name, str) else None
    if rule is None:
        stated = "it names no pre-tokenizer" if name is None else f"pre-tokenizer {name!r} is not known"
        raise ModelError(
            f"{source}: {stated} (tokenizer.ggml.pre), so its token ids would be guesses; "
            f"known: {', '.join(sorted(SPLIT_RULES))}. Use the model's Hugging Face folder instead"
        )
    return rule


def _pair(merge: str) -> tuple[str, str]:
    cut = merge.index(" ", 1)  # the alphabet has no space, but older writers let one begin a token
    return merge[:cut], merge[cut + 1 :]


def _framing(metadata: Mapping[str, Any], add_bos: bool) -> list[Any]:
    """Puts the beginning and end tokens around a text, if the file asks for them."""
    tokens = metadata["tokenizer.ggml.tokens"]
    single, special = ["$A"], []
    for name, default in (("bos", add_bos), ("eos", False)):
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None and metadata.get(f"tokenizer.ggml.add_{name}_token", default):
            single.insert(0 if name == "bos" else len(single), tokens[index])
            special.append((tokens[index], index))
    if not special:
        return []
    pair = [*single, *("$B:1" if part == "$A" else f"{part}:1" for part in single)]
    return [processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)]


def _add_fixed_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any], keeps_space: bool = True) -> None:
    """Control and user-defined tokens match whole in any text; only the former vanish from decoded text."""
    typed = list(zip(metadata["tokenizer.ggml.tokens"], _kinds(metadata), strict=False))
    for wanted, add in ((CONTROL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens)):
        added = []
        for token in (token for token, kind in typed if kind == wanted):
            strips = not keeps_space and wanted == CONTROL and token not in _KEEPS_SPACE
            added.append(AddedToken(token, normalized=False, special=wanted == CONTROL, rstrip=strips))
        add(added)


def _kinds(metadata: Mapping[str, Any]) -> list[int]:
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type") or []
    return kinds


def _sentencepiece(metadata: Mapping[str, Any], source: Path) -> Tokenizer:
    """Sentencepiece BPE: no splits, spaces written out, bytes for what the vocabulary lacks.

    Sentencepiece always joins the neighbours whose union scores best, so merges ranked by score do the same.
    """
    vocabulary = _vocabulary(metadata, source)
    scores = metadata["tokenizer.ggml.scores"]
    joined = [
        (-scores[index], token)
        for (token, index), kind in zip(vocabulary.items(), _kinds(metadata), strict=True)
        if kind not in (UNKNOWN, CONTROL, BYTE)
    ]
    merges = [
        (token[:cut], token[cut:])
        for _, token in sorted(joined, key=lambda scored: scored[0])
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    unknown = metadata["tokenizer.ggml.tokens"][metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    leading = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    written = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), written]) if leading else written
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if leading else [])])
    if framing := _framing(metadata, add_bos=True):
        tokenizer.post_processor = framing[0]
    _add_fixed_tokens(tokenizer, metadata, keeps_space=metadata.get("general.architecture") != "phi3")
    return tokenizer


def tokenizer_config(metadata: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    """The contents of tokenizer_config.json: named tokens, chat template, longest input in tokens."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    tokens = metadata["tokenizer.ggml.tokens"]
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and 0 <= index < len(tokens):
            config[f"{name}_token"] = tokens[index]
    template = metadata.get("tokenizer.chat_template")
    if template:
        config["chat_template"] = template
    return config


def write_tokenizer(metadata: Mapping[str, Any], source: Path, folder: Path, max_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `folder`. Raises ModelError as `build_tokenizer`."""
    build_tokenizer(metadata, source).save(str(folder / "tokenizer.json"))
    config = tokenizer_config(metadata, max_length)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
