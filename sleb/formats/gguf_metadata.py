"""The metadata of a GGUF file from a model's folder: its sizes, its rotation, its tokenizer.

What each key means: `sleb.models.gguf.config`, which reads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sleb.engine.model.rotary import Rotary
from sleb.errors import ConfigError, ModelError
from sleb.fields import Fields, read_json, shown, shown_path
from sleb.models.families import Family
from sleb.models.gguf.tokenizer import BY_RULE, build_tokenizer, pre_tokenizer
from sleb.models.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_vocabulary
from sleb.models.tokenizer import LoadedTokenizer, load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Floats = npt.NDArray[np.float32]

_INSTEAD = "export with --format hf, and convert that with llama.cpp's convert_hf_to_gguf.py"
# Tells rules of splitting apart, and ids that come of them: digits, contractions, marks, scripts, runs of blanks.
_PROBE = (
    "Hello world! I'm sure it's THEY'RE 'S 'll we'Ve 1 12 123 1234 12345 3.14 3..5 x=[1,2];\n\n\n  \t tab\r\n    four"
    " HelloWORLDfoo camelCase a/b//\n c\\d ... !!!??? ----==== naïve café नमस्ते 你好世界2024年 Привет ١٢٣ ½ Ⅷ 😀"
    " \u00a0\u3000``''\"\" $5 #tag @me _under_score (x) {y} <z> ~^|\n \n\n  end  "
)


def size_keys(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes, norms and what the family's own keys say.

    config: fields of config.json, with those that name sizes, and the epsilon as "epsilon".
    """
    assert family.gguf is not None
    keys: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "vocab_size": config["vocab_size"],
        f"attention.layer_norm_{'rms_' if family.norm == 'rms' else ''}epsilon": float(config["epsilon"]),
    }
    for name, (key, _) in family.gguf.keys.items():
        if key is not None and config[name] is not None:
            keys[key] = config[name]
    return keys


def rotation_keys(
    config: Fields, family: Family, values: Mapping[str, Any], rotaries: Sequence[Rotary]
) -> tuple[dict[str, Any], dict[str, Floats]]:
    """Keys, and tensors that scale frequencies; `rotaries`: of all blocks, or of those without and with a window.

    Raises ConfigError for what llama.cpp does not compute.
    """
    assert family.gguf is not None
    objects = (config.object(name, None) for name in ("rope_scaling", "rope_parameters"))
    rope = next((each for each in objects if each is not None and each.values), Fields({}, config.source))
    named = "full_attention" in rope
    keys, factors = _rotation(
        config, family, rope.object("full_attention") if named else rope, values["rope_theta"], rotaries[0]
    )
    if len(rotaries) > 1:
        local: Any = family.local_rope_theta
        local = values[local] if isinstance(local, str) else local
        own = rope.object("sliding_attention") if named else Fields({}, rope.source)
        local_keys, _ = _rotation(config, family, own, local, rotaries[1])
        if set(local_keys) != {"rope.freq_base", "rope.dimension_count"}:
            raise _no_rotation(config, family, own)
        if "rope_local_base_freq" in family.gguf.keys:
            keys["rope.freq_base_swa"] = local_keys["rope.freq_base"]
        elif local_keys["rope.freq_base"] != keys["rope.freq_base"]:
            raise ConfigError(
                f"{shown_path(config.source)}: blocks with a window rotate by another rope_theta than the others, "
                f"which llama.cpp does not know in its architecture {family.gguf.name}: use --format hf"
            )
    return keys, factors


def _rotation(
    config: Fields, family: Family, rope: Fields, theta: float, rotary: Rotary
) -> tuple[dict[str, Any], dict[str, Floats]]:
    """Of one kind of layer; theta: the base, unless the rotation's own object has one."""
    frequencies, scaling = np.array(rotary.frequencies, np.float32), rotary.scaling
    num = 2 * len(frequencies)
    theta = rope.number("rope_theta", 1.0, 1e15, theta)
    if family.ntk_alpha and "alpha" in rope:
        theta *= rope.number("alpha", 0.0, 1e6) ** (num / (num - 2))
    keys: dict[str, Any] = {"rope.freq_base": float(theta), "rope.dimension_count": num}
    plain = (float(theta) ** -(np.arange(0, num, 2) / num)).astype(np.float32)
    if rotary.long_frequencies is not None:
        keys["rope.scaling.attn_factor"] = scaling
        keys["rope.scaling.original_context_length"] = rotary.original
        long = np.array(rotary.long_frequencies, np.float32)
        both = {"long": plain / long, "short": plain / frequencies}
        return keys, {f"rope_factors_{name}.weight": each for name, each in both.items()}
    if np.allclose(plain, frequencies, rtol=1e-5, atol=0) and scaling == 1.0:
        return keys, {}
    assert family.gguf is not None
    rule = rope.values.get("rope_type") or rope.values.get("type")
    if rule == "linear":
        factor = float(plain[0] / frequencies[0])
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": factor}, {}
    if rule == "yarn":
        factor = rope.number("factor", 0.0, 1e6)
        original = rope.integer(
            "original_max_position_embeddings", 1, 1 << 31, config.values.get("max_position_embeddings")
        )
        keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(factor)}
        keys["rope.scaling.original_context_length"] = original
        for name in ("beta_fast", "beta_slow"):
            if name in rope:
                keys[f"rope.scaling.yarn_{name}"] = float(rope.number(name, 0.0, 1e6))
        own = scaling / (0.1 * math.log(max(factor, 1.0)) + 1.0)
        return keys | ({} if math.isclose(own, 1.0, rel_tol=1e-6) else {"rope.scaling.attn_factor": own}), {}
    if scaling == 1.0 and family.gguf.divides_frequencies:
        return keys, {"rope_freqs.weight": plain / frequencies}
    raise _no_rotation(config, family, rope)


def _no_rotation(config: Fields, family: Family, rope: Fields) -> ConfigError:
    rule = rope.values.get("rope_type") or rope.values.get("type")
    return ConfigError(
        f"{shown_path(config.source)}: the rotation {shown(rule)} of {family.architecture} is none that llama.cpp can "
        "be told of: use --format hf"
    )


def tokenizer_keys(path: Path, vocab_size: int) -> dict[str, Any]:
    """The tokenizer of a folder; what is written is read back and held against it on a text.

    Byte-level BPE, of which the splitting of text must be one that llama.cpp knows by name, and BPE over characters
    with bytes for what it lacks (sentencepiece's). Raises ConfigError for others.
    """
    loaded = load_tokenizer(path, vocab_size)
    if loaded.tokenizer is None:
        raise ConfigError(f"{shown_path(path)} has no tokenizer, which a GGUF file must have")
    tokenizer = loaded.tokenizer
    data = json.loads(tokenizer.to_str())
    keys = _vocabulary(path, tokenizer, data, vocab_size) | _special(path, loaded)
    for name, template in loaded.templates.items():
        suffix = "" if name == "default" else f".{name}"
        keys[f"tokenizer.chat_template{suffix}"] = template
    if keys["tokenizer.ggml.model"] == "gpt2":
        _check(path, tokenizer, keys)
        return keys
    for prefix in (True, False):
        keys["tokenizer.ggml.add_space_prefix"] = prefix
        try:
            _check(path, tokenizer, keys)
        except ConfigError:
            if not prefix:
                raise
        else:
            break
    return keys


def _vocabulary(path: Path, tokenizer: Tokenizer, data: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    model = data["model"]
    if model["type"] != "BPE":
        raise ConfigError(
            f"{shown_path(path)}: a {model['type']} tokenizer is not written as GGUF, BPE ones are: {_INSTEAD}"
        )
    sentencepiece = bool(model.get("byte_fallback"))
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {each["id"]: CONTROL if each["special"] else USER_DEFINED for each in data["added_tokens"]}
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    kinds = [added.get(index, NORMAL if index in by_id else UNUSED) for index in range(vocab_size)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if sentencepiece else "gpt2",
        "tokenizer.ggml.pre": "default" if sentencepiece else _rule_name(path, tokenizer, data),
        "tokenizer.ggml.tokens": tokens,
    }
    if not sentencepiece:
        return keys | {"tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": merges}
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", ""), rank)
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)}
    unknown = model.get("unk_token")
    kinds = [
        UNKNOWN if token == unknown else BYTE if token in bytes_ else kind
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    scores = [
        -float(ranks.get(token, len(merges))) for token in tokens
    ]  # the neighbours of the best one are joined
    return keys | {"tokenizer.ggml.scores": scores, "tokenizer.ggml.token_type": kinds}


def _rule_name(path: Path, tokenizer: Tokenizer, data: dict[str, Any]) -> str:
    """llama.cpp's name for how the tokenizer splits text: the first rule that gives the same pieces of the probe."""
    normalizer = (data.get("normalizer") or {}).get("type")
    whole_words = bool(data["model"].get("ignore_merges"))
    found = tokenizer.pre_tokenizer
    pieces = found.pre_tokenize_str(_PROBE) if found is not None else []
    for rule, names in BY_RULE.items():
        same = rule.whole_words == whole_words and normalizer == ("NFC" if rule.nfc else None)
        if same and pre_tokenizer(rule).pre_tokenize_str(_PROBE) == pieces:
            return names[0]
    raise ConfigError(
        f"{shown_path(path)}: how its tokenizer splits text is none of the ways that are known by llama.cpp's names "
        f"for them ({', '.join(names[0] for names in BY_RULE.values())}): {_INSTEAD}"
    )


def _special(path: Path, loaded: LoadedTokenizer) -> dict[str, Any]:
    assert loaded.tokenizer is not None
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {
        key: index
        for key, name in names.items()
        if (index := loaded.tokenizer.token_to_id(loaded.named_tokens.get(name, ""))) is not None
    }
    try:
        ends = read_json(path / "generation_config.json").values.get("eos_token_id")
    except FileNotFoundError:
        ends = None
    others = [each for each in (ends if isinstance(ends, list) else [ends]) if isinstance(each, int)]
    if "eos" not in ids and others:
        ids["eos"] = others[0]
    more = (each for each in others if each != ids.get("eos"))
    ids |= dict(zip(("eot", "eom"), more, strict=False))
    framed = loaded.tokenizer.encode("a").ids
    return {f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items()} | {
        "tokenizer.ggml.add_bos_token": bool(framed) and framed[0] == ids.get("bos"),
        "tokenizer.ggml.add_eos_token": bool(framed) and framed[-1] == ids.get("eos"),
    }


def _check(path: Path, tokenizer: Tokenizer, keys: Mapping[str, Any]) -> None:
    """Raises ConfigError where what is written makes other ids of the probe than the tokenizer does."""
    fields = Fields({"general.architecture": "llama", **keys}, path)
    vocabulary = read_vocabulary(fields)
    try:
        again = build_tokenizer(replace(vocabulary, template=None))
    except ModelError as error:
        raise ConfigError(str(error)) from None
    if again.encode(_PROBE).ids != tokenizer.encode(_PROBE).ids:
        raise ConfigError(
            f"{shown_path(path)}: its tokenizer makes other ids of a text than its vocabulary does as GGUF says it: "
            f"{_INSTEAD}"
        )
