"""config.json at its border: what the family has is read as transformers reads it; the rest is refused in a line."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sleb.engine.llm import LLM
from sleb.engine.model.allocation import all_sublayers, allocate
from sleb.engine.model.architecture import DecoderSpec, resolve_spec
from sleb.engine.model.rotary import RotaryTables
from sleb.errors import ConfigError, ModelError
from sleb.models.families import FAMILIES, Family
from sleb.models.resolve import check_model

FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)


def config_class(family: Family) -> Any:
    return CONFIG_MAPPING[family.model_type]


def small(family: Family, **changes: Any) -> dict[str, Any]:
    """A whole, valid config.json of the family as transformers writes it."""
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}
    inner: dict[str, Any] = {family.own("intermediate_size"): 48}
    if family.position == "rope":
        inner["num_key_value_heads"] = 2
    if family.model_type == "gpt_neo":
        inner["attention_types"] = [[["global", "local", "global"], 1]]
    return json.loads(config_class(family)(**shape, **inner, **changes).to_json_string(use_diff=False))


def spec_of(folder: Path, config: Any) -> DecoderSpec:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return resolve_spec(folder)


LLAMA = small(FAMILIES["LlamaForCausalLM"]) | {"architectures": ["LlamaForCausalLM"]}
QWEN = small(FAMILIES["Qwen2ForCausalLM"]) | {"architectures": ["Qwen2ForCausalLM"]}
PHI = small(FAMILIES["Phi3ForCausalLM"], pad_token_id=0) | {"architectures": ["Phi3ForCausalLM"]}
LOCAL = {"rope_parameters": None, "rope_theta": 500.0, "rope_local_base_freq": 50.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@FAMILY
def test_what_is_absent_is_what_transformers_fills_in(family: Family) -> None:
    theirs = config_class(family)()
    rotary = getattr(theirs, "rope_parameters", None) or {}
    derived = {"num_key_value_heads", "head_dim", "word_embed_proj_dim", "layer_types", "no_rope_layers"}
    derived |= {
        "num_local_experts",
        "moe_layer_end_index",
        "intermediate_size",
        "attention_layers",
        "attention_multiplier",
    }
    for name, ours in family.fields.items():
        own = family.own(name)
        if name in ("qkv_bias", "bias") and family.model_type == "internlm3":
            assert ours is False  # their class takes them for other names of attention_bias and mlp_bias
        elif name == "rope_local_base_freq":
            assert rotary["sliding_attention"]["rope_theta"] == ours
        elif name in ("rope_theta", "partial_rotary_factor"):
            assert rotary.get("full_attention", rotary)[name] == ours, name
        elif name == "sliding_window_pattern":  # which kinds of layers come of it, the next test looks at
            assert getattr(theirs, name, ours) == ours
        elif ours is not None or hasattr(theirs, own):
            if name == "sliding_window" and not getattr(theirs, "use_sliding_window", True):
                continue  # their class takes it away
            assert ours == getattr(theirs, own) or (ours is None and name in derived), name


@FAMILY
def test_a_config_of_the_model_type_alone(family: Family, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, {"model_type": family.model_type})
    theirs = config_class(family)()
    assert (spec.architecture, spec.num_blocks, spec.hidden_size, spec.vocab_size) == (
        family.architecture,
        theirs.num_hidden_layers,
        theirs.hidden_size,
        theirs.vocab_size,
    )
    assert spec.head_dim == (
        getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    )
    kinds = getattr(theirs, "layer_types", None) or getattr(theirs, "attention_layers", None)
    if kinds is not None and getattr(theirs, "use_sliding_window", True):
        slide = [kind in ("sliding_attention", "local") for kind in kinds]
        assert [window is not None for window in spec.windows] == slide


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architectures": ({"architectures": -1}, "architectures is -1; it must be a list"),
    "architectures text": (
        {"architectures": "LlamaForCausalLM"},
        'architectures is "LlamaForCausalLM"; .* a list',
    ),
    "architectures of numbers": ({"architectures": [1]}, r"architectures is \[1\]; .*names"),
    "unknown": (
        {"architectures": ["\x1b[2JMamba"]},
        r'architectures \["\\u001b\[2JMamba"\] is not supported; .*docs/models\.md',
    ),
    "model_type that disagrees": ({"model_type": "qwen2"}, 'model_type is "qwen2"; it must be llama, since'),
    "model_type": ({"model_type": 5}, "model_type is 5"),
    "negative": (
        {"intermediate_size": -1},
        "intermediate_size is -1; it must be an integer from 1 to 1048576",
    ),
    "width": ({"hidden_size": 2**40}, "hidden_size is 1099511627776; it must be an integer from 1 to 131072"),
    "blocks": ({"num_hidden_layers": 2**40}, "num_hidden_layers is 1099511627776; .* from 1 to 1024"),
    "positions": (
        {"max_position_embeddings": 10**30},
        "max_position_embeddings is 10+; it must be an integer",
    ),
    "true": ({"num_hidden_layers": True}, "num_hidden_layers is true; it must be an integer"),
    "text": ({"vocab_size": "96"}, 'vocab_size is "96"; it must be an integer'),
    "half": ({"vocab_size": 96.5}, "vocab_size is 96.5"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "more heads than features": (
        {"num_attention_heads": 64, "head_dim": None},
        "hidden_size is 32; .*64, or more",
    ),
    "uneven heads": ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must be a divisor of .* 4"),
    "odd head": ({"head_dim": 7}, "head_dim is 7; it must be even"),
    "theta": ({"rope_parameters": None, "rope_theta": "x"}, 'rope_theta is "x"; it must be a number above 1'),
    "theta inside": ({"rope_parameters": {"rope_theta": []}}, r"rope_parameters: rope_theta is \[\]"),
    "theta of 1": ({"rope_parameters": {"rope_theta": 1}}, "rope_theta is 1; it must be a number above 1"),
    "factor": (
        {"rope_scaling": {"type": "linear", "factor": "4.0"}},
        r'config.json: rope_scaling: factor is "4.0"; it must be a number above 0',
    ),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
    "rule": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        'type is "dynamic"; it must be one of default, lin',
    ),
    "rule number": ({"rope_scaling": {"rope_type": 3}}, "rope_type is 3"),
    "rope list": ({"rope_scaling": [4.0]}, r"rope_scaling is \[4.0\]; it must be an object"),
    "rope by layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
        "full_attention is .*layer to layer",
    ),
    "bands": (
        {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
        "high_freq_factor is 4; it must be a number above 4",
    ),
    "eps": ({"rms_norm_eps": "1e-05"}, 'rms_norm_eps is "1e-05"; it must be a number'),
    "dtype": ({"dtype": None, "torch_dtype": {"a": 1}}, r'torch_dtype is \{"a": 1\}; it must be a string'),
    "dtype name": ({"dtype": "flot16"}, 'dtype is "flot16"; it must be one of float32'),
    "flag": ({"tie_word_embeddings": "false"}, 'tie_word_embeddings is "false"; it must be true or false'),
    "flag number": ({"attention_bias": 1}, "attention_bias is 1; it must be true or false"),
    "activation": ({"hidden_act": "mish"}, 'hidden_act is "mish"; it must be one of silu'),
    "end": ({"eos_token_id": {"a": 1}}, "eos_token_id is .*a token's id"),
    "ends": ({"eos_token_id": [2, "3"]}, r"eos_token_id is \[2, \"3\"\]"),
}
REFUSED_QWEN: dict[str, tuple[dict[str, Any], str]] = {
    "window list": ({"sliding_window": []}, r"sliding_window is \[\]; it must be an integer"),
    "window 0": (
        {"use_sliding_window": True, "sliding_window": 0},
        "sliding_window is 0; .*or null for none",
    ),
    "short list": (
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"]},
        r"layer_types is .*each of 3 blocks; it has 1",
    ),
    "kind": (
        {"layer_types": ["chunked_attention"] * 3},
        "layer_types is .*full_attention and sliding_attention",
    ),
    "scaling short": (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        r"short_factor is \[1.0\]; it must be a list of 4 numbers",
    ),
}


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [(LLAMA, *case) for case in REFUSED.values()] + [(QWEN, *case) for case in REFUSED_QWEN.values()],
    ids=[*REFUSED, *REFUSED_QWEN],
)
def test_each_wrong_value_is_one_line(
    base: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        spec_of(tmp_path, base | change)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "config.json")) and text.isprintable() and len(text) < 500


@pytest.mark.parametrize(
    "text", ["[]", "{", "", "NaN", '{"a":' * 10**5, '{"hidden_size": NaN, "model_type": "llama"}']
)
def test_a_file_that_is_no_config(text: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        spec_of(tmp_path, text)


def test_a_whole_number_may_be_written_as_a_float(tmp_path: Path) -> None:
    assert spec_of(tmp_path, LLAMA | {"vocab_size": 96.0, "eos_token_id": 2.0}) == spec_of(tmp_path, LLAMA)


@pytest.mark.parametrize(
    "left_over",
    [
        {"sliding_window": 8},
        {"partial_rotary_factor": 0.5},
        {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": True, "sliding_window": 8},
        {"no_rope_layers": "x", "original_max_position_embeddings": 16, "activation_function": 3},
        {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5, "factor": "x"}},
    ],
)
def test_fields_of_other_families_are_not_read(left_over: dict[str, Any], tmp_path: Path) -> None:
    assert spec_of(tmp_path, LLAMA | left_over) == spec_of(tmp_path, LLAMA)


def test_windows_of_every_spelling(tmp_path: Path) -> None:
    """Absent and null are not the same: transformers' MistralConfig slides where nothing is said."""
    mistral = small(FAMILIES["MistralForCausalLM"], sliding_window=None) | {
        "architectures": ["MistralForCausalLM"]
    }
    assert spec_of(tmp_path, mistral).windows == (None,) * 3
    del mistral["sliding_window"]
    assert spec_of(tmp_path, mistral).windows == (4096,) * 3
    assert spec_of(tmp_path, QWEN | {"use_sliding_window": False, "sliding_window": 0}).windows == (None,) * 3
    derived = QWEN | {
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": None,
        "max_window_layers": 2,
    }
    assert spec_of(tmp_path, derived).windows == (None, None, 4)


@pytest.mark.parametrize(
    ("base", "change", "default", "longest"),
    [
        (QWEN, {"max_position_embeddings": 64, "rope_scaling": YARN}, 64, 256),
        (QWEN, {"max_position_embeddings": 256, "rope_scaling": YARN}, 256, 256),
        (LLAMA, {"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2.5}}, 64, 160),
        (LLAMA, {"max_position_embeddings": 64}, 64, 64),
        (
            LLAMA,
            {"max_position_embeddings": 2**20, "rope_scaling": {"type": "linear", "factor": 1e6}},
            2**20,
            2**27,
        ),
    ],
)
def test_the_context_that_scaling_allows(
    base: dict[str, Any], change: dict[str, Any], default: int, longest: int, tmp_path: Path
) -> None:
    spec = spec_of(tmp_path, base | {"rope_parameters": None} | change)
    assert (spec.max_positions, spec.longest_context) == (default, longest)


numbers = st.floats(0.5, 64, width=32)
rope_settings = st.one_of(
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": numbers}),
    st.fixed_dictionaries(
        {"rope_type": st.just("llama3"), "factor": numbers, "low_freq_factor": st.floats(0.5, 2)}
        | {"high_freq_factor": st.floats(2.5, 8)},
        optional={"original_max_position_embeddings": st.integers(2, 10**5)},
    ),
    st.fixed_dictionaries(
        {"rope_type": st.just("yarn"), "factor": st.none() | numbers},
        optional={
            "original_max_position_embeddings": st.integers(2, 10**5),
            "attention_factor": st.none() | numbers,
            "beta_fast": st.none() | st.floats(16, 64),
            "beta_slow": st.none() | st.floats(0.5, 4),
            "mscale": st.none() | st.floats(0, 2),
            "mscale_all_dim": st.none() | st.floats(0, 2),
            "truncate": st.booleans(),
        },
    ),
    st.fixed_dictionaries(
        {"rope_type": st.just("longrope"), "factor": st.none() | numbers}
        | dict.fromkeys(("short_factor", "long_factor"), st.lists(numbers, min_size=8, max_size=8)),
        optional={
            "attention_factor": st.none() | numbers,
            "original_max_position_embeddings": st.integers(2, 10**5),
        },
    ),
)


@settings(max_examples=100)
@given(
    rope_settings,
    st.floats(2.0, 1e7),
    st.integers(2, 10**5),
    st.none() | st.integers(2, 10**5),
    st.booleans(),
    st.booleans(),
)
def test_rotary_angles_are_those_of_transformers(
    tmp_path_factory: pytest.TempPathFactory,
    rope: dict[str, Any],
    theta: float,
    positions: int,
    original: int | None,
    older: bool,
    long: bool,
) -> None:
    """Every rule and every field of it, in both spellings, with and without an original context beside it."""
    folder = tmp_path_factory.getbasetemp()
    config = LLAMA | {"rope_parameters": None, "head_dim": 16, "max_position_embeddings": positions}
    if older:
        config |= {"rope_scaling": rope, "rope_theta": theta}
    else:
        config["rope_parameters"] = rope | {"rope_theta": theta}
    if original is not None:
        config["original_max_position_embeddings"] = original
    spec = spec_of(folder, config)
    theirs = transformers.LlamaConfig(**copy.deepcopy(config))
    edge = spec.rotaries[0].original
    wanted, scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, torch.device("cpu"), seq_len=edge + long)
    ours = (
        spec.rotaries[0].long_frequencies
        if long and rope["rope_type"] == "longrope"
        else spec.rotaries[0].frequencies
    )
    torch.testing.assert_close(torch.tensor(ours), wanted.float(), rtol=1e-5, atol=0)
    assert spec.rotaries[0].scaling == pytest.approx(scaling, rel=1e-6)


def same_as_transformers(folder: Path, num_tokens: int, **options: Any) -> None:
    """Log-probabilities of the folder's model, by sleb and by transformers in float32."""
    token_ids = [(7 * at + at * at // 3) % 96 for at in range(num_tokens)]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([token_ids]), use_cache=False).logits[0, :-1]
    wanted = logits.float().log_softmax(-1).gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
    llm = LLM(str(folder), "none", dtype="float32", device="cpu", **options)
    assert (llm.score(token_ids) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "change", "num_tokens", "options"),
    [
        ("llama", {"sliding_window": 8}, 60, {}),
        ("llama", {"partial_rotary_factor": 0.5}, 60, {}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, 200, {"max_model_len": 256}),
        ("qwen2", {"rope_scaling": YARN}, 200, {"max_model_len": 256}),
        ("qwen2", {"rope_scaling": YARN, "original_max_position_embeddings": 32}, 60, {}),
        # As the first files of these families spell it.
        ("gpt-neox", {"rope_parameters": None, "rotary_pct": 0.5, "rotary_emb_base": 500}, 60, {}),
        ("phi", {"rope_parameters": None, "partial_rotary_factor": 0.25, "rope_theta": 500.0}, 60, {}),
        ("gemma3", LOCAL | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 60, {}),
        ("gemma3", {"layer_types": None, "sliding_window_pattern": 2, "sliding_window": 7}, 60, {}),
        ("olmo3", LOCAL | {"rope_scaling": YARN}, 60, {}),
        ("cwm", {"rope_parameters": None}, 60, {}),
        (
            "hunyuan",
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "alpha": 9.0, "factor": 1.0}},
            60,
            {},
        ),
    ],
)
def test_the_same_folder_under_transformers(
    name: str,
    change: dict[str, Any],
    num_tokens: int,
    options: dict[str, Any],
    tiny_model: Any,
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(tiny_model(name).path, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    same_as_transformers(folder, num_tokens, **options)


def test_more_context_than_scaling_allows_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("qwen2").path, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": YARN}))
    with pytest.raises(ConfigError, match="max_model_len is 257, but the model has 256 positions"):
        LLM(str(folder), "none", dtype="float32", device="cpu", max_model_len=257)


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_the_names_that_phi3_has_for_longrope(name: str, tmp_path: Path) -> None:
    rope = {"type": name, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = PHI | {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": rope}
    config |= {"max_position_embeddings": 128, "original_max_position_embeddings": 32}
    rotary = spec_of(tmp_path, config).rotaries[0]
    assert rotary is not None and rotary.original == 32
    tables = RotaryTables(rotary, 33, torch.device("cpu"))
    for long, divisor in ((False, 1.0), (True, 2.0), (False, 1.0)):
        tables.select(long)
        assert tables.cos[2, 0] / rotary.scaling == pytest.approx(math.cos(2 / divisor))


absurd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 2, 4, 2**31, 2**40, 2**63, 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["4.0", "silu", "yarn", "\x1b[2J", "x" * 10**5, "bfloat16"]),
    st.lists(st.integers(-2, 3) | st.sampled_from(["sliding_attention", "full_attention"]), max_size=6),
    st.recursive(
        st.integers(), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner)
    ),
)
ROPE_FIELDS = (
    *("rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "attention_factor"),
    *(
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    *("short_factor", "long_factor", "partial_rotary_factor"),
)


def any_config(family: Family, config: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    names = (
        *family.fields,
        "architectures",
        "model_type",
        "dtype",
        "torch_dtype",
        "rope_parameters",
        "rope_scaling",
    )
    rules = st.sampled_from(["linear", "llama3", "yarn", "longrope", "default", "su"])
    rope = st.dictionaries(st.sampled_from(ROPE_FIELDS), absurd, max_size=4)
    rope = st.builds(lambda rule, rest: {"rope_type": rule} | rest, rules, rope | rope_settings)
    changes = st.dictionaries(st.sampled_from(names), absurd, max_size=3)
    scaling = st.sampled_from(["rope_parameters", "rope_scaling"])
    missing = st.sets(st.sampled_from(names), max_size=2)
    return st.builds(
        lambda changes, name, rope, missing: {
            name: value for name, value in (config | changes | ({name: rope} if rope else {})).items()
            if name not in missing
        },
        changes, scaling, st.none() | rope, missing,
    )  # fmt: skip


def check_any_config(folder: Path, config: dict[str, Any]) -> None:
    """Refused in one short, printable line, or a spec whose weights can be laid out."""
    try:
        spec = spec_of(folder, config)
    except ModelError as error:
        text = str(error)
        assert text.isprintable() and len(text) < 600, text
        assert "config.json" in text
        return
    _, targets = allocate(spec, all_sublayers(spec), torch.float32, torch.device("meta"))
    assert len(targets) < 20 * 1024
    if spec.rotaries:
        tables = RotaryTables(spec.rotaries[0], 3, torch.device("cpu"))
        assert tables.cos.isfinite().all() and tables.sin.isfinite().all()


def configs() -> st.SearchStrategy[dict[str, Any]]:
    written = [
        (family, small(family) | {"architectures": [family.architecture]}) for family in FAMILIES.values()
    ]
    return st.one_of(any_config(*each) for each in written)


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(configs())
def test_any_config_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]
) -> None:
    check_any_config(tmp_path_factory.getbasetemp(), config)


@pytest.mark.slow
@settings(max_examples=5000, suppress_health_check=list(HealthCheck))
@given(configs())
def test_any_config_is_read_or_refused_long(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]
) -> None:
    check_any_config(tmp_path_factory.getbasetemp(), config)


def test_a_wrong_config_is_told_by_every_command_before_torch_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 2**40}))
    with pytest.raises(ModelError, match=r"num_hidden_layers is 1099511627776; .* from 1 to 1024"):
        check_model(str(tmp_path))
    program = (
        "import sys; from sleb.models.resolve import check_model; from sleb.errors import ModelError\n"
        "try: check_model(sys.argv[1])\n"
        "except ModelError: raise SystemExit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == 0


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family in FAMILIES.values() for name in family.only],
    ids=lambda each: each if isinstance(each, str) else each.model_type,
)
def test_a_variant_that_is_not_computed_is_named(family: Family, name: str, tmp_path: Path) -> None:
    last = family.only[name][-1]
    other = not last if isinstance(last, bool) else last / 2
    allowed = " or ".join(map(json.dumps, family.only[name]))
    config = {"model_type": family.model_type, family.own(name): other}
    with pytest.raises(
        ModelError, match=rf"{family.own(name)} is [\w.]+; it must be {allowed}: .*{family.architecture}"
    ):
        spec_of(tmp_path, config)
