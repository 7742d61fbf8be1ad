"""LayerMap: round trips, questions against plain sets, and one clear error for each kind of bad file."""

from __future__ import annotations

import io
import itertools
import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoConfig

from sleb import LLM
from sleb.cli.show import find_map, print_map, strip
from sleb.errors import LayerMapError
from sleb.layer_map.layer_map import CalibrationRecord, LayerMap, Part, TextLosses, Unit, shipped_maps
from sleb.models.config import model_fingerprint

PARTS: tuple[Part, Part] = ("attention", "mlp")
GOOD: dict[str, Any] = {
    "schema_version": 1,
    "model": "llama-tiny",
    "fingerprint": "sha256:ab",
    "num_blocks": 6,
    "removed": [3, "1.attention"],
    "losses": [10.0, 11, 12.5],
    "candidate_losses": [{"1": 20.0, "3": 11, "4": None}, {"1.attention": 12.5}],
    "calibration": {
        "source": "text.txt",
        "seqlen": 8,
        "windows": 2,
        "token_hash": "sha256:cd",
        "dtype": "float32",
    },
    "depth": 1,
    "source": None,
}
finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.none() | st.text(st.characters(exclude_categories=["Cs"]))


@st.composite
def layer_maps(draw: st.DrawFn) -> LayerMap:
    num_blocks = draw(st.integers(1, 9))
    choices: list[list[Unit]] = [
        draw(st.sampled_from([[], [Unit(b)], [Unit(b, "mlp")], [Unit(b, "mlp"), Unit(b, "attention")]]))
        for b in range(num_blocks)
    ]
    removed = draw(st.permutations(list(itertools.chain.from_iterable(choices))))
    length = len(removed)
    units = st.builds(Unit, st.integers(0, num_blocks - 1), st.sampled_from(("block", *PARTS)))
    rounds = st.dictionaries(units, finite | st.just(math.inf))
    whole = st.none() | st.integers(0, 10**6)
    of_depths = st.lists(finite, min_size=length + 1, max_size=length + 1).map(tuple)
    records = st.builds(
        CalibrationRecord, texts, texts, whole, whole, whole, texts, texts, st.none() | st.booleans()
    )
    return LayerMap(
        model=draw(st.text(st.characters(exclude_categories=["Cs"]))),
        fingerprint=draw(texts),
        num_blocks=num_blocks,
        removed=tuple(removed),
        losses=draw(st.none() | of_depths),
        candidate_losses=draw(st.none() | st.lists(rounds, min_size=length, max_size=length).map(tuple)),
        calibration=draw(st.none() | records),
        held_out=draw(
            st.lists(st.builds(TextLosses, records, st.just(()) | of_depths), max_size=2).map(tuple)
        ),
        depth=draw(st.integers(0, length)),
        source=draw(texts),
    )


@given(layer_maps())
def test_json_round_trip(layer_map: LayerMap) -> None:
    text = layer_map.to_json()
    assert LayerMap.from_json(text) == layer_map
    assert LayerMap.from_json(text).to_json() == text

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    document = json.loads(text, parse_constant=refuse)
    assert list(document) == sorted(document)


def test_held_out_texts_are_read_by_earlier_versions_and_from_their_files() -> None:
    """An earlier version knows one text, and reads the first of several."""
    one = {"held_out": {"source": "one.txt", "seqlen": 4, "windows": 2}, "held_out_losses": [8.0, 16, 24]}
    two = {"record": {"source": "two.txt", "seqlen": 2, "windows": 2}, "losses": [4.0, 5, 6]}
    old = LayerMap.from_json(json.dumps(GOOD | one))
    assert [text.record.source for text in old.held_out] == ["one.txt"]
    assert [old.held_out[0].token_loss(depth) for depth in range(3)] == [1, 2, 3]
    assert "further_held_out" not in json.loads(old.to_json())
    both = LayerMap.from_json(json.dumps(GOOD | one | {"further_held_out": [two]}))
    assert both.held_out[:1] == old.held_out
    assert both.held_out[1].perplexity(2) == pytest.approx(math.exp(1.5))
    assert [text.losses for text in both.at(1).held_out] == [(8.0, 16), (4.0, 5)]
    document = json.loads(both.to_json())
    assert {name: document[name] for name in ("held_out", "held_out_losses")} == {
        name: json.loads(old.to_json())[name] for name in ("held_out", "held_out_losses")
    }
    shows = " ".join(shown(both).split())
    assert "one.txt" in shows and "two.txt" in shows and f"{math.exp(1.5):.3f}" in shows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out_losses": [1.0]}, "held_out_losses has 1 values; 2 removals need 3"),
        (
            {"held_out": {}, "further_held_out": [{"losses": [1, 2]}]},
            r"further_held_out\[0\].losses has 2 values",
        ),
        ({"further_held_out": [3]}, r"further_held_out\[0\] is 3; it must be an object"),
        ({"further_held_out": [{"record": 1}]}, "record is 1; it must be an object"),
        ({"further_held_out": [{}] * 65}, "further_held_out has 65 entries"),
    ],
)
def test_held_out_texts_that_are_none(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LayerMapError, match=message):
        LayerMap.from_json(json.dumps(GOOD | changes))


def test_the_sources_of_a_mix() -> None:
    assert CalibrationRecord("wiki.txt=0.7,chats.jsonl:messages, self=0.3").sources == {
        *("wiki.txt", "chats.jsonl:messages", "self")
    }
    assert CalibrationRecord("a.txt").sources == {"a.txt"} and CalibrationRecord().sources == frozenset()


def test_a_file_round_trip_leaves_nothing_beside_it(tmp_path: Path) -> None:
    layer_map = LayerMap.from_json(json.dumps(GOOD))
    path = tmp_path / "map.json"
    path.write_text("an older file")
    layer_map.save(path)
    assert LayerMap.load(path) == layer_map
    assert [each.name for each in tmp_path.iterdir()] == ["map.json"]
    assert layer_map.candidate_losses is not None
    assert layer_map.candidate_losses[0] == {Unit(1): 20.0, Unit(3): 11.0, Unit(4): math.inf}
    assert json.loads(path.read_text())["candidate_losses"][0] == {"1": 20.0, "3": 11.0, "4": None}


def test_saving_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    LayerMap.dense("m", 3).save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert LayerMap.load(tmp_path / "real.json") == LayerMap.dense("m", 3)


def test_saving_where_one_cannot_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LayerMapError, match="cannot be written"):
        LayerMap.dense("m", 3).save(tmp_path / "no such folder" / "map.json")


@given(layer_maps())
def test_questions_against_plain_sets(layer_map: LayerMap) -> None:
    everything = {(block, part) for block in range(layer_map.num_blocks) for part in PARTS}
    gone: set[tuple[int, Part]] = set()
    for depth in range(layer_map.max_depth + 1):
        if depth:
            unit = layer_map.removed[depth - 1]
            gone |= {(unit.block, part) for part in PARTS if unit.part in ("block", part)}
        runs = {pair for pair in everything if layer_map.active(pair, depth)}
        assert runs == everything - gone
        assert gone == {
            pair
            for pair in everything
            if (place := layer_map.removed_at(*pair)) is not None and place <= depth
        }
        for block in range(layer_map.num_blocks):
            assert layer_map.active(Unit(block), depth) == any((block, part) in runs for part in PARTS)
        cut = layer_map.at(depth)
        assert (cut.removed, cut.depth, cut.max_depth) == (layer_map.removed[:depth], depth, depth)
        assert cut.digest(depth) == layer_map.digest(depth)
        assert cut.losses is None or len(cut.losses) == depth + 1


@given(layer_maps(), st.randoms())
def test_a_digest_is_that_of_the_set(layer_map: LayerMap, random: Any) -> None:
    shuffled = list(layer_map.removed)
    random.shuffle(shuffled)
    other = LayerMap("another name", layer_map.fingerprint, layer_map.num_blocks, tuple(shuffled))
    assert other.digest(other.max_depth) == layer_map.digest(layer_map.max_depth)
    digests = [layer_map.digest(depth) for depth in range(layer_map.max_depth + 1)]
    assert len(set(digests)) == len(digests)


def test_a_block_digests_like_its_two_parts() -> None:
    whole = LayerMap("m", None, 4, (Unit(2),))
    parts = LayerMap("m", None, 4, (Unit(2, "mlp"), Unit(2, "attention")))
    assert whole.digest(1) == parts.digest(2) != parts.digest(1)
    assert LayerMap("m", None, 5, (Unit(2),)).digest(1) != whole.digest(1)
    assert (parts.active(Unit(2), 1), parts.active(Unit(2), 2)) == (True, False)
    assert (parts.removed_at(2, "block"), parts.removed_at(2, "mlp"), parts.removed_at(1, "mlp")) == (
        2,
        1,
        None,
    )


def test_recommended_depth() -> None:
    layer_map = LayerMap("m", None, 6, (Unit(1), Unit(2), Unit(3)))
    assert layer_map.depth == 3
    assert (layer_map.recommend(2).depth, layer_map.recommend(2).max_depth) == (2, 3)
    assert LayerMap.dense("m", 6).depth == 0


@pytest.mark.parametrize("depth", [-1, 3, True, 1.0, None])
def test_a_depth_out_of_the_order_names_the_range(depth: Any) -> None:
    layer_map = LayerMap("m", None, 6, (Unit(1), Unit(2)))
    for question in (
        layer_map.at,
        layer_map.digest,
        layer_map.recommend,
        lambda k: layer_map.active(Unit(5), k),
    ):
        with pytest.raises(LayerMapError, match="depths 0 to 2"):
            question(depth)


def test_units_are_written_and_read() -> None:
    for unit, text in [(Unit(14), "14"), (Unit(0, "mlp"), "0.mlp"), (Unit(7, "attention"), "7.attention")]:
        assert (str(unit), Unit.parse(text)) == (text, unit)
    assert Unit(2).sublayers == ((2, "attention"), (2, "mlp"))
    assert Unit(2, "mlp").sublayers == ((2, "mlp"),)
    for bad in ("", "-1", "x", "1.", "1.block", "1.head", "1 ", "²", "03", "9" * 30):
        with pytest.raises(LayerMapError, match="must be written like"):
            Unit.parse(bad)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "future schema": ({"schema_version": 2}, "schema_version is 2.*newer sleb"),
    "schema zero": ({"schema_version": 0}, "schema_version is 0; it must be an integer from 1"),
    "schema text": ({"schema_version": "1"}, 'schema_version is "1"; it must be an integer'),
    "schema true": ({"schema_version": True}, "schema_version is true"),
    "model number": ({"model": 3}, "model is 3; it must be a string"),
    "no blocks": ({"num_blocks": 0}, "num_blocks is 0; it must be an integer from 1 to 1024"),
    "half a block": ({"num_blocks": 6.5}, "num_blocks is 6.5; it must be an integer"),
    "out of range": ({"removed": [3, 6]}, "unit 6 in removed is not in the model llama-tiny: .* 0 to 5"),
    "negative": ({"removed": [-1, 3]}, r"removed\[0\] is -1"),
    "no such part": ({"removed": [3, "1.head"]}, r"removed\[1\] is \"1.head\""),
    "repeat": ({"removed": [3, 3]}, "unit 3 in removed is repeated"),
    "repeat in another notation": ({"removed": [3, "3"]}, "unit 3 in removed is repeated"),
    "block after its part": ({"removed": ["3.attention", 3]}, "unit 3 in removed overlaps 3.attention"),
    "part after its block": ({"removed": [3, "3.mlp"]}, "unit 3.mlp in removed overlaps 3"),
    "not a list": ({"removed": 3}, "removed is 3; it must be a list"),
    "few losses": ({"losses": [1.0, 2.0]}, "losses has 2 values; 2 removals need 3"),
    "infinite loss": ({"losses": [1.0, 2.0, 1e999]}, "finite number"),
    "nan loss": ({"losses": [1.0, math.nan, 3.0]}, "NaN.*finite number"),
    "huge loss": ({"losses": [1.0, 10**400, 3.0]}, r"losses\[1\] is 10+.*finite number"),
    "text loss": ({"losses": [1.0, "2.0", 3.0]}, r'losses\[1\] is "2.0"; it must be a number'),
    "null loss": ({"losses": [1.0, None, 3.0]}, r"losses\[1\] is null"),
    "few rounds": ({"candidate_losses": [{}]}, "candidate_losses has 1 rounds"),
    "candidate out of range": ({"candidate_losses": [{"9": 1.0}, {}]}, r"unit 9 in candidate_losses\[0\]"),
    "candidate misspelt": ({"candidate_losses": [{"x": 1.0}, {}]}, r'a unit of candidate_losses\[0\] is "x"'),
    "candidate text": ({"candidate_losses": [{"1": "a"}, {}]}, r"candidate_losses\[0\] of unit 1"),
    "candidates a list": ({"candidate_losses": [[], {}]}, r"candidate_losses\[0\] is \[\]"),
    "seqlen text": ({"calibration": {"seqlen": "8"}}, 'calibration: seqlen is "8"; it must be an integer'),
    "calibration list": ({"calibration": []}, "calibration is .*an object"),
    "depth too deep": ({"depth": 3}, "depth is 3; .* 0 to 2"),
    "depth negative": ({"depth": -1}, "depth is -1"),
    "fingerprint": ({"fingerprint": 5}, "fingerprint is 5; it must be a string"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_each_kind_of_bad_map_has_its_own_error(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(LayerMapError, match=message) as caught:
        LayerMap.load(path)
    assert "bad.json" in str(caught.value)


def test_a_model_s_name_reaches_no_terminal_as_it_is() -> None:
    layer_map = LayerMap.from_json(json.dumps(GOOD | {"model": "\x1b]0;owned\x07" + "x" * 1000}))
    messages = []
    for question in (lambda: layer_map.at(9), lambda: layer_map.check_model(num_blocks=7, model="\x1b[2J")):
        with pytest.raises(LayerMapError, match=r"x{100}") as caught:
            question()
        messages.append(str(caught.value))
    assert all(text.isprintable() and len(text) < 600 for text in messages)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just("\x1b[2J" * 999),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)
numbers = st.sampled_from([0, 1, 2**31, 2**40, 2**64, 10**400, -1, 3.0, True])
records = st.dictionaries(st.sampled_from(["source", "seed", "seqlen", "windows", "special_tokens"]), values)
units = st.integers(-1, 7) | st.sampled_from(["1", "1.mlp", "6.attention", "0x1"]) | values
documents = st.builds(
    lambda changes, missing: {key: value for key, value in (GOOD | changes).items() if key not in missing},
    st.dictionaries(
        st.sampled_from([*GOOD, "search", "held_out", "further_held_out"]),
        values | numbers | records,
        max_size=3,
    )
    | st.fixed_dictionaries({"removed": st.lists(units, max_size=5), "losses": st.none() | st.lists(numbers)})
    | st.fixed_dictionaries({"candidate_losses": st.lists(st.dictionaries(st.text(max_size=3), values))}),
    st.sets(st.sampled_from([*GOOD]), max_size=1),
)


def check_any_document(document: dict[str, Any]) -> None:
    """A map that can be written, shown and read again, or one short line that a terminal may see."""
    try:
        layer_map = LayerMap.from_json(json.dumps(document))
    except LayerMapError as error:
        text = str(error)
        assert text.startswith("layer map") and text.isprintable() and len(text) < 500, text
        return
    assert LayerMap.from_json(layer_map.to_json()) == layer_map
    assert strip(layer_map, layer_map.depth)


@settings(max_examples=200)
@given(documents)
def test_any_map_is_read_or_refused(document: dict[str, Any]) -> None:
    check_any_document(document)


@pytest.mark.slow
@settings(max_examples=5000)
@given(documents)
def test_any_map_is_read_or_refused_long(document: dict[str, Any]) -> None:
    check_any_document(document)


@pytest.mark.parametrize("num_blocks", [2**40, 1025])
def test_no_map_counts_blocks_that_no_model_has(num_blocks: int) -> None:
    message = f"num_blocks is {num_blocks}; it must be an integer from 1 to 1024"
    with pytest.raises(LayerMapError, match=message):
        LayerMap.from_json(json.dumps(GOOD | {"num_blocks": num_blocks}))


@pytest.mark.parametrize("key", ["schema_version", "model", "num_blocks", "removed"])
def test_a_missing_field_is_named(key: str) -> None:
    with pytest.raises(LayerMapError, match=f"{key} is missing"):
        LayerMap.from_json(json.dumps({name: value for name, value in GOOD.items() if name != key}))


@pytest.mark.parametrize("text", ["", "{", "not json", "[" * 100_000, "1" * 5000, '{"a": 1}}', "\x00"])
def test_text_that_is_not_json(text: str) -> None:
    with pytest.raises(LayerMapError, match="cannot be read as JSON"):
        LayerMap.from_json(text)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
def test_a_truncated_file(fraction: float) -> None:
    text = json.dumps(GOOD)
    with pytest.raises(LayerMapError, match="cannot be read as JSON"):
        LayerMap.from_json(text[: int(len(text) * fraction)])


@pytest.mark.parametrize("text", ["[]", "3", "null", '"map"', "true", "1.5"])
def test_json_that_is_not_an_object(text: str) -> None:
    with pytest.raises(LayerMapError, match="it must be a JSON object"):
        LayerMap.from_json(text)


def test_a_name_that_no_file_can_have_is_none() -> None:
    with pytest.raises(LayerMapError, match="neither a file nor shipped") as caught:
        find_map("x" * 5000)
    assert len(str(caught.value)) < 400


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(LayerMapError, match="does not exist"):
        LayerMap.load(tmp_path / "none.json")
    with pytest.raises(LayerMapError, match="cannot be read"):
        LayerMap.load(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"model": "\xff"}')
    with pytest.raises(LayerMapError, match=r"cannot be read as JSON: .utf-8."):
        LayerMap.load(tmp_path / "latin.json")


def test_fields_of_later_versions_are_ignored_and_optional_ones_may_be_left_out() -> None:
    extra = {**GOOD, "comment": "hand-made", "calibration": {**GOOD["calibration"], "language": "en"}}
    assert LayerMap.from_json(json.dumps(extra)) == LayerMap.from_json(json.dumps(GOOD))
    least = {"schema_version": 1, "model": "m", "num_blocks": 4, "removed": [2]}
    assert LayerMap.from_json(json.dumps(least)) == LayerMap("m", None, 4, (Unit(2),))


def test_a_map_for_another_model_names_both() -> None:
    layer_map = LayerMap.from_json(json.dumps(GOOD))
    layer_map.check_model(num_blocks=6, fingerprint="sha256:ab", model="other")
    layer_map.check_model(num_blocks=6, fingerprint=None, model="other")
    with pytest.raises(LayerMapError, match="llama-tiny with 6 blocks, but other has 7"):
        layer_map.check_model(num_blocks=7, fingerprint="sha256:ab", model="other")
    with pytest.raises(LayerMapError, match=r"llama-tiny .*sha256:ab.*other has another shape .*sha256:ef"):
        layer_map.check_model(num_blocks=6, fingerprint="sha256:ef", model="other")
    LayerMap("m", None, 6).check_model(num_blocks=6, fingerprint="sha256:ef", model="other")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "opt"])
def test_fingerprint_of_left_out_defaults(family: str) -> None:
    written = AutoConfig.for_model(family).to_dict()
    assert model_fingerprint(written) == model_fingerprint({"model_type": family})
    without_heads = {key: value for key, value in written.items() if key not in ("head_dim", "torch_dtype")}
    assert model_fingerprint(without_heads) == model_fingerprint(written)


def test_fingerprint_of_the_hub_config_and_of_what_it_covers() -> None:
    shape = {
        "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    }  # fmt: skip
    base = model_fingerprint(shape)
    assert base.startswith("sha256:") and len(base) == 7 + 64
    assert model_fingerprint({**shape, "head_dim": 64, "rope_theta": 1e5, "dtype": "bfloat16"}) == base
    assert model_fingerprint({**shape, "head_dim": None}) == base
    for key, value in shape.items():
        assert (
            model_fingerprint({**shape, key: "opt" if key == "model_type" else int(str(value)) * 3}) != base
        )
    multi_head = {key: value for key, value in shape.items() if key != "num_key_value_heads"}
    assert model_fingerprint(multi_head) == model_fingerprint({**shape, "num_key_value_heads": 9})


PUBLISHED = {
    "opt-13b": (40, [5, 4, 9, 2, 14, 25, 34, 10], "2402.09025"),
    "llama-2-7b": (32, [14, 23, 11, 24, 10, 27, 15], "2402.09025"),
    "llama-2-13b": (40, [33, 31, 32, 30, 29, 34, 28, 35, 27, 26], "2403.03853v3, Table 9"),
    "mistral-7b": (32, [26, 25, 24, 27], "2406.15786"),
    "mistral-7b-attention": (32, [25, 26, 24, 22], "2406.15786"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_maps(name: str) -> None:
    num_blocks, blocks, source = PUBLISHED[name]
    layer_map = find_map(name)
    assert (layer_map.num_blocks, [unit.block for unit in layer_map.removed]) == (num_blocks, blocks)
    assert layer_map.source is not None and source in layer_map.source
    assert {unit.part for unit in layer_map.removed} == {"attention" if "attention" in name else "block"}


@pytest.mark.parametrize("name", shipped_maps())
def test_shipped_maps_are_in_the_written_form(name: str) -> None:
    path = shipped_maps()[name]
    assert LayerMap.load(path).to_json(path.stem) == path.read_text(encoding="utf-8")


def shown(layer_map: LayerMap, depth: int | None = None) -> str:
    console = Console(width=80, color_system=None, file=io.StringIO())
    print_map(layer_map, depth, console)
    return cast(io.StringIO, console.file).getvalue()


def test_show_draws_what_is_kept() -> None:
    layer_map = LayerMap.from_json(json.dumps(GOOD))
    text = shown(layer_map)
    assert "depth 1 of 0 to 2, 5 of 6 blocks kept" in text
    assert "   0   1   2   3   4   5\n  ▉▉  ▉▉  ▉▉  ░░  ▉▉  ▉▉" in text
    assert "4.5 of 6 blocks kept" in shown(layer_map, 2)
    assert strip(layer_map, 2)[1] == "  ▉▉   m  ▉▉  ░░  ▉▉  ▉▉"
    (recommended,) = [line for line in text.splitlines() if "recommended" in line]
    assert f"{11 / 16:.4f}" in recommended and f"{math.exp(11 / 16):.3f}" in recommended
    assert "nats a token" in text
    unknown = shown(LayerMap.from_json(json.dumps({**GOOD, "calibration": None})))
    assert "loss (sum over the text)" in " ".join(unknown.split()) and "11.00" in unknown
    assert "perplexity" not in unknown
    assert "held out: none, and the calibration text flatters" in text
    assert "calibration: source text.txt, seqlen 8, windows 2, token hash sha256:cd" in text


def test_show_of_a_published_list_and_of_errors(tiny_model_dir: Path) -> None:
    text = shown(find_map("opt-13b"))
    assert "32 of 40 blocks kept" in text and "arXiv:2402.09025" in text and "  32  33  34" in text
    with pytest.raises(LayerMapError, match=r"shipped are: .*opt-13b"):
        find_map("no-such-map")
    with pytest.raises(LayerMapError, match="is for opt-13b with 40 blocks"):  # every command takes the name
        LLM(str(tiny_model_dir), "opt-13b")
    with pytest.raises(LayerMapError, match="depths 0 to 8"):
        shown(find_map("opt-13b"), 9)


def test_the_shipped_demo_map_fits_the_hubs_own_checkpoints() -> None:
    """config.json of HuggingFaceTB/SmolLM2-135M and -Instruct on the hub, as far as the shape goes."""
    hub = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "torch_dtype": "bfloat16",
    }
    layer_map = LayerMap.load(shipped_maps()["smollm2-135m-instruct"])
    layer_map.check_model(num_blocks=30, fingerprint=model_fingerprint(hub), model="SmolLM2-135M")
    assert (layer_map.depth, layer_map.max_depth) == (0, 10)
    assert {layer_map.removed[0].block, layer_map.removed[-1].block}.isdisjoint({0, 29})
    assert all(
        min(found, key=found.__getitem__) == unit
        for unit, found in zip(layer_map.removed, layer_map.candidate_losses or (), strict=True)
    )
    assert layer_map.search is not None and layer_map.search.objective == "kl"
    for depth in range(1, 11):  # each removal leaves one patch
        patches = layer_map.patches_at(depth, hub["hidden_size"])
        assert {patch.form for patch in patches} == {"full"}
        gone = {each for unit in layer_map.removed[:depth] for each in unit.sublayers}
        stood = {(block, part) for patch in patches for block in range(patch.first[0], patch.last[0] + 1)
                 for part in ("attention", "mlp")}  # fmt: skip
        assert stood == gone
