"""Foreign notations of what is removed: samples as the foreign tools write them, and there and back again."""

from __future__ import annotations

import json
import shlex
import sys

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sleb import cli
from sleb.engine.model.architecture import resolve_spec
from sleb.errors import ConfigError, LayerMapError, ModelError, SlebError
from sleb.formats import EXPORT_FORMATS, IMPORT_FORMATS
from sleb.formats.decilm import ffn_mult
from sleb.formats.exporting import export_model, parse_size
from sleb.formats.importing import import_map
from sleb.formats.mergekit import write_mergekit
from sleb.formats.removal import Removal
from sleb.layer_map.layer_map import LayerMap, Unit, shipped_maps
from sleb.models.config import model_fingerprint

NUM_BLOCKS = 5

# As sleb.py appends it, for the published LLaMA-2-7B result.
SLEB_RESULT = """\
Time Elapsed: 1843.7342
Model Name: meta-llama/Llama-2-7b-hf
# Total Blocks: 32
# Remove Blocks: 7
Dataset: wikitext2
Seed: 0
Barriers: early 1 / latter 1
Block Removal Order: [14, 23, 11, 24, 10, 27, 15]
WikiText-2 PPL = 9.14
C4 PPL = 11.21

"""

# The README of LLM-Drop, in a config.json of Mistral.
LLM_DROP = {
    "model_type": "mistral",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "auto_map": {"AutoConfig": "configuration_dropped_mistral.MistralConfig"},
    "drop_mlp_list": [26, 27],
    "drop_attn_list": [25, 26, 24, 22],
}

# The beginning of ppls/Llama-2-7b_mix_alpaca_ns_64_del_order_list.json.
BLOCKPRUNER = (
    '{"1": [["mha", 25]], "2": [["mha", 25], ["mha", 27]], "3": [["mha", 24], ["mha", 25], ["mha", 27]], '
    '"4": [["mha", 23], ["mha", 24], ["mha", 25], ["mha", 27]], '
    '"5": [["mlp", 7], ["mha", 23], ["mha", 24], ["mha", 25], ["mha", 27]]}'
)

MERGEKIT = """\
slices:
  - sources:
      - model: meta-llama/Llama-2-7b-hf
        layer_range: [0, 10]
  - sources:
      - model: meta-llama/Llama-2-7b-hf@main
        layer_range: [12, 14]
        parameters:
          scale:
            - filter: o_proj
              value: 0.0
            - filter: down_proj
              value: 1.0
            - value: 1.0
  - sources:
      - model: meta-llama/Llama-2-7b-hf
        layer_range: [14, 30]
merge_method: passthrough
dtype: bfloat16
"""


def nemotron_block(attention=True, ffn=True):
    """A block of nvidia/Llama-3_1-Nemotron-51B-Instruct's config.json."""
    return {
        "attention": {
            "n_heads_in_group": 8 if attention else None,
            "no_op": not attention,
            "num_sink_tokens": None,
            "replace_with_linear": False,
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
            "window_length": None,
        },
        "ffn": {
            "ffn_mult": 5.25 if ffn else None,
            "no_op": not ffn,
            "replace_with_linear": False,
            "sparsify": None,
        },
    }


NEMOTRON = {
    "architectures": ["DeciLMForCausalLM"],
    "model_type": "nemotron-nas",
    "num_hidden_layers": 4,
    "block_configs": [
        nemotron_block(),
        nemotron_block(attention=False),
        nemotron_block(attention=False, ffn=False),
        nemotron_block(ffn=False),
    ],
}


@pytest.fixture
def read(tmp_path):
    """read(text or JSON value, name=…, **options): the layer map of a file that holds it, and its notes."""

    def call(content, notation="auto", name="foreign", **options):
        file = tmp_path / name
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        notes = []
        return import_map(file, notation, note=notes.append, **options), notes

    return call


def units(layer_map):
    return [str(unit) for unit in layer_map.removed]


# --- what the foreign tools write


@pytest.mark.parametrize(
    "text",
    [
        "[14, 23, 11]",
        "[14, 23, 11,]\n",
        "removal_list = [14, 23, 11]\n",
        "removal_list: List[int] = [14,\n  23, 11]",
        "python eval.py --removal_list '[14, 23, 11]'",
        '{"removal_list": [14, 23, 11]}',
        "14,23,11\n",
    ],
    ids=["json", "trailing comma", "python", "several lists", "command", "object", "csv"],
)
def test_removal_list(text, read):
    if "List[int]" in text:  # two brackets: it cannot be told for sure which is meant
        with pytest.raises(LayerMapError, match="no notation that sleb knows"):
            read(text, num_blocks=32)
        return
    layer_map, _ = read(text, num_blocks=32)
    assert units(layer_map) == ["14", "23", "11"]
    assert (layer_map.num_blocks, layer_map.fingerprint, layer_map.depth) == (32, None, 3)
    assert read(text, "removal-list", num_blocks=32)[0] == layer_map


def test_an_order_of_all_blocks_keeps_the_last(read):
    """As Shortened LLaMA's block_order.csv."""
    layer_map, notes = read("3,1,4,0,2\n", num_blocks=5)
    assert units(layer_map) == ["3", "1", "4", "0"] and layer_map.depth == 1
    assert "orders all blocks: the last stays, and the map recommends 20%, depth 1" in notes[-1]


def test_sleb_result_is_the_map_that_ships(read):
    layer_map, _ = read(SLEB_RESULT)
    shipped = LayerMap.load(shipped_maps()["llama-2-7b"])
    assert layer_map.removed == shipped.removed
    assert layer_map.calibration == shipped.calibration
    assert (layer_map.model, layer_map.num_blocks) == ("Llama-2-7b-hf", 32)
    assert "WikiText-2 perplexity 9.14, C4 perplexity 11.21" in layer_map.source
    printed = "Loaded Model\nCurrent Block Removal List: [14]\n" + SLEB_RESULT.replace(
        "Time Elapsed", "Time_Elapsed"
    )
    assert read(printed)[0].removed == shipped.removed


def test_llm_drop(read, tmp_path):
    layer_map, _ = read(LLM_DROP, name="config.json")
    assert units(layer_map) == ["25.attention", "26", "24.attention", "22.attention", "27.mlp"]
    assert layer_map.num_blocks == 32
    assert layer_map.fingerprint == model_fingerprint({"model_type": "mistral", "hidden_size": 4096})
    assert import_map(tmp_path) == layer_map  # the folder itself
    # As save_pretrained of a loaded model writes them, and as an iterated run may: one number twice.
    flags = {
        "num_hidden_layers": 4,
        "drop_attn_list": [False, True, False, True],
        "drop_mlp_list": [False, False, False, False],
    }
    assert units(read(flags)[0]) == ["1.attention", "3.attention"]
    twice = {"num_hidden_layers": 4, "drop_attn_list": [3, 1, 3]}
    assert units(read(twice)[0]) == ["3.attention", "1.attention"]


def test_blockpruner(read):
    layer_map, _ = read(BLOCKPRUNER, num_blocks=32)
    assert units(layer_map) == ["25.attention", "27.attention", "24.attention", "23.attention", "7.mlp"]


def test_mergekit(read):
    layer_map, _ = read(MERGEKIT, num_blocks=32)
    assert units(layer_map) == ["10", "11", "12.attention", "13.attention", "30", "31"]
    assert layer_map.model == "Llama-2-7b-hf"
    as_module = "modules:\n  default:\n" + "".join(f"    {line}\n" for line in MERGEKIT.splitlines()[:-2])
    assert read(as_module + "merge_method: passthrough\n", num_blocks=32)[0].removed == layer_map.removed


@pytest.mark.parametrize(
    ("scale", "removed"),
    [
        ("0.0", ["2", "0", "1"]),
        ("1", ["2"]),
        ("[{filter: self_attn, value: 0}]", ["2", "0.attention", "1.attention"]),
        ("[{filter: down_proj, value: 0}, {filter: o_proj, value: 0}, {value: 1}]", ["2", "0", "1"]),
        ("[{filter: layers.1.mlp.down_proj, value: 0}]", ["2", "1.mlp"]),
        ("[{value: 1.0}, {filter: o_proj, value: 0}]", ["2"]),  # the first that fits counts
        ("{filter: '*', value: 0}", ["2", "0", "1"]),
    ],
)
@pytest.mark.parametrize("level", ["source", "slice", "file"])
def test_mergekit_scales(scale, removed, level, read):
    """mergekit looks at a source's own parameters, then at the slice's, then at the file's."""
    parameters = f"parameters: {{scale: {scale}}}"
    text = f"""
slices:
- sources: [{{model: m, layer_range: [0, 2]{", " + parameters if level == "source" else ""}}}]
  {parameters if level == "slice" else ""}
merge_method: passthrough
{parameters if level == "file" else ""}
"""
    layer_map, _ = read(text, num_blocks=3)
    assert sorted(units(layer_map)) == sorted(removed)


def test_decilm(read):
    layer_map, notes = read(NEMOTRON)
    assert units(layer_map) == ["1.attention", "2", "3.mlp"]
    assert (layer_map.num_blocks, notes) == (4, [])
    wider = json.loads(json.dumps(NEMOTRON))
    wider["block_configs"][0]["ffn"]["ffn_mult"] = 1.3125
    assert read(wider)[0] == layer_map
    assert "differ in width" in read(wider)[1][0]


# --- there and back again

sublayer_orders = st.permutations(
    [Unit(block, part) for block in range(NUM_BLOCKS) for part in ("attention", "mlp")]
).flatmap(lambda order: st.integers(1, 2 * NUM_BLOCKS - 1).map(lambda count: tuple(order[:count])))
block_orders = st.permutations([Unit(block) for block in range(NUM_BLOCKS)]).flatmap(
    lambda order: st.integers(1, NUM_BLOCKS - 1).map(lambda count: tuple(order[:count]))
)


@st.composite
def mixed_orders(draw):
    """Whole blocks and parts of others."""
    whole = draw(st.sets(st.integers(0, NUM_BLOCKS - 1), max_size=NUM_BLOCKS - 1))
    parts = [unit for unit in draw(sublayer_orders) if unit.block not in whole]
    order = draw(st.permutations([*(Unit(block) for block in sorted(whole)), *parts]))
    return tuple(order) or (Unit(0),)


def removal_of(order, depth=None):
    layer_map = LayerMap("m", None, NUM_BLOCKS, removed=order)
    return Removal(layer_map, len(order) if depth is None else depth)


def gone(layer_map):
    """(block, part) in the order of the map."""
    return [sublayer for unit in layer_map.removed for sublayer in unit.sublayers]


def back(text, tmp_path_factory, notation):
    file = tmp_path_factory.mktemp("back") / "file"
    file.write_text(text)
    found = import_map(file, num_blocks=NUM_BLOCKS)
    assert import_map(file, notation, num_blocks=NUM_BLOCKS) == found  # recognised for what it is
    return found


@settings(max_examples=12)
@given(order=block_orders)
def test_whole_blocks_return_from_every_notation(order, tiny_model, tmp_path_factory):
    model, layer_map = str(tiny_model("llama").path), LayerMap("m", None, NUM_BLOCKS, removed=order)

    def text(notation):
        return export_model(model, notation, layer_map=layer_map)[1]

    assert back(text("removal-list"), tmp_path_factory, "removal-list").removed == order
    assert back(text("llm-drop"), tmp_path_factory, "llm-drop").removed == order
    assert gone(back(text("blockpruner"), tmp_path_factory, "blockpruner")) == gone(layer_map)
    assert back(text("mergekit"), tmp_path_factory, "mergekit").removed == tuple(sorted(order))
    words = shlex.split(text("llama.cpp"))
    assert words[:2] == ["llama-quantize", "--prune-layers"]
    assert words[2] == ",".join(str(unit.block) for unit in sorted(order))
    assert words[3:] == ["MODEL.gguf", f"MODEL-sleb-{len(order)}.gguf", "COPY"]


@settings(max_examples=12)
@given(order=mixed_orders())
@pytest.mark.parametrize("name", ["llama", "opt", "phi3"])
def test_parts_return_from_every_notation_that_has_them(name, order, tiny_model, tmp_path_factory):
    assume(len(gone(LayerMap("m", None, NUM_BLOCKS, order))) < 2 * NUM_BLOCKS)
    removal = removal_of(order)
    model = str(tiny_model(name).path)
    texts = {
        notation: export_model(model, notation, layer_map=removal.layer_map)[1]
        for notation in ("llm-drop", "blockpruner", "mergekit")
    }
    wanted = set(removal.sublayers)
    for notation, text in texts.items():
        assert set(gone(back(text, tmp_path_factory, notation))) == wanted
    for part in ("attention", "mlp"):  # each list keeps its order
        dropped = [block for block, each in removal.sublayers if each == part]
        assert (
            json.loads(texts["llm-drop"])["drop_attn_list" if part == "attention" else "drop_mlp_list"]
            == dropped
        )
    assert gone(back(texts["blockpruner"], tmp_path_factory, "blockpruner")) == list(removal.sublayers)


def test_a_smaller_depth_is_a_smaller_removal():
    removal = removal_of((Unit(3), Unit(1, "mlp"), Unit(0), Unit(1, "attention")), depth=3)
    assert removal.blocks == (3, 0)
    assert removal.parts == ((1, "mlp"),)
    assert removal.kept_blocks == (1, 2, 4)
    assert removal_of(removal.layer_map.removed).blocks == (3, 0, 1)  # both parts of 1, the last at depth 4


def test_mergekit_says_which_lists_to_mend(tiny_model):
    """mergekit changes the number of blocks and leaves layer_types as long as it was."""
    spec = resolve_spec(tiny_model("qwen2-window").path)
    text = write_mergekit(removal_of((Unit(0), Unit(3))), spec, "someone/qwen")
    assert text.startswith("# mergekit keeps lists")
    assert "# layer_types: ['full_attention', 'sliding_attention', 'sliding_attention']\n" in text
    document = yaml.safe_load(text)
    assert [each["sources"][0]["layer_range"] for each in document["slices"]] == [[1, 3], [4, 5]]
    assert document["slices"][0]["sources"][0]["model"] == "someone/qwen"
    assert (document["merge_method"], document["dtype"]) == ("passthrough", "float32")


def test_llama_cpp_names_the_file_it_prunes(tiny_model):
    from pathlib import Path

    from sleb.formats.removal_list import write_llama_cpp

    spec = resolve_spec(tiny_model("llama").path)
    line = write_llama_cpp(removal_of((Unit(3), Unit(1))), spec, Path("my models/a.gguf"))
    assert shlex.split(line)[2:] == ["1,3", "my models/a.gguf", "my models/a-sleb-2.gguf", "COPY"]


@pytest.mark.parametrize(
    ("width", "hidden"), [(14336, 4096), (1536, 576), (11008, 4096), (28672, 8192), (256, 7)]
)
def test_ffn_mult_gives_the_width_back(width, hidden):
    """By the formula that vLLM and llama.cpp have."""
    size = int(2 * ffn_mult(width, hidden) * hidden / 3)
    assert (size if size % 256 == 0 else size + 256 - size % 256) == width
    assert ffn_mult(width + 1, hidden) is None


# --- what cannot be


@pytest.mark.parametrize(
    ("content", "notation", "options", "message"),
    [
        ("[1, 2]", "auto", {}, "does not say how many blocks the model has: add --model or --num-blocks"),
        ("[1, 2]", "auto", {"num_blocks": 0}, "num-blocks 0 must be 1 or more"),
        ("[]", "auto", {"num_blocks": 4}, "it removes nothing"),
        ("[1, 9]", "auto", {"num_blocks": 4}, "unit 9 in removed is not in the model.*blocks are 0 to 3"),
        ("[1, 1]", "auto", {"num_blocks": 4}, "unit 1 in removed is repeated"),
        ("[1, -1]", "auto", {"num_blocks": 4}, r"removal_list\[1\] is '-1'"),
        ("[1, true]", "auto", {"num_blocks": 4}, r"removal_list\[1\] is 'True'"),
        ('["1"]', "auto", {"num_blocks": 4}, r"removal_list\[0\] is '1'; it must be a block's number"),
        (
            "[__import__('os')]",
            "removal-list",
            {"num_blocks": 4},
            "holds no removal list, which is written like",
        ),
        (
            "hello",
            "auto",
            {"num_blocks": 4},
            "in no notation that sleb knows: removal-list, sleb-result, llm-drop",
        ),
        ("{}", "auto", {"num_blocks": 4}, "in no notation that sleb knows"),
        ("[1]", "llama", {}, "format 'llama' is unknown: choose auto, removal-list"),
        ('{"schema_version": 1}', "auto", {}, "is a layer map of sleb already"),
        (SLEB_RESULT * 2, "auto", {}, "holds 2 lines 'Block Removal Order"),
        (SLEB_RESULT.replace("Remove Blocks: 7", "Remove Blocks: 6"), "auto", {}, "its removal order has 7"),
        (
            SLEB_RESULT.replace("Blocks: 32", "Blocks: many"),
            "auto",
            {},
            "'# Total Blocks: many' must hold a number",
        ),
        (SLEB_RESULT, "auto", {"num_blocks": 40}, "the file says 32, --num-blocks says 40"),
        ("[1]", "sleb-result", {}, "holds 0 lines"),
        ("nonsense", "llm-drop", {}, "is not JSON, or is cut short"),
        ("{}", "llm-drop", {}, "neither drop_attn_list nor drop_mlp_list"),
        ('{"drop_attn_list": 3}', "auto", {"num_blocks": 4}, "drop_attn_list is '3'; it must be a list"),
        ('{"drop_attn_list": [1.5]}', "auto", {"num_blocks": 4}, r"drop_attn_list\[0\] is '1.5'"),
        (
            '{"num_hidden_layers": 3, "drop_attn_list": [true]}',
            "auto",
            {},
            "drop_attn_list has 1 truth values for 3 blocks",
        ),
        (
            '{"1": [["mha", 2]], "2": [["mlp", 3]]}',
            "auto",
            {"num_blocks": 4},
            'entry "2" must hold the 1 removals',
        ),
        ('{"1": [["mha", 2]], "3": []}', "auto", {"num_blocks": 4}, 'entry "2" is missing'),
        ('{"1": [["moe", 2]]}', "auto", {"num_blocks": 4}, r"must be like \[\"mha\", 25\]"),
        ("[1]", "blockpruner", {}, "no BlockPruner order"),
        ("merge_method: [", "mergekit", {}, "is not YAML, or is cut short"),
        ("merge_method: !!python/object:os.system x", "mergekit", {}, "is not YAML"),
        (MERGEKIT.replace("passthrough", "slerp"), "auto", {}, "merge_method is 'slerp'; only passthrough"),
        (MERGEKIT.replace("hf@main", "chat"), "auto", {}, "merges 2 models"),
        (MERGEKIT.replace("hf@main", "hf+adapter"), "auto", {}, "a name is needed, without a LoRA"),
        (
            MERGEKIT.replace("[12, 14]", "[8, 14]"),
            "auto",
            {"num_blocks": 32},
            r"\[8, 14\] goes back to block 8",
        ),
        (MERGEKIT.replace("[12, 14]", "[14, 12]"), "auto", {}, r"layer_range \[14, 12\]; it must rise"),
        (MERGEKIT.replace("14]", "999999999999]"), "auto", {}, "it must rise, from 0 on, to 10000 at most"),
        (MERGEKIT.replace("[12, 14]", "[12]"), "auto", {}, r"layer_range \[12\]; it must be like"),
        (MERGEKIT.replace("0.0", "0.5"), "auto", {"num_blocks": 32}, "block 12 is scaled by 0.5"),
        (
            MERGEKIT.replace("0.0", "[0, 1]"),
            "auto",
            {"num_blocks": 32},
            "is no number and no list of filters",
        ),
        (MERGEKIT, "auto", {"num_blocks": 20}, "keeps block 29, but Llama-2-7b-hf has 20 blocks"),
        (MERGEKIT, "auto", {}, "does not say how many blocks"),
        (
            "models: [{model: m}]\nmerge_method: passthrough",
            "auto",
            {},
            "it has no slices with a layer_range",
        ),
        ('{"block_configs": []}', "auto", {}, "no list block_configs"),
        ('{"block_configs": [{"attention": {}}]}', "auto", {}, r"block_configs\[0\] has no ffn"),
        ({**NEMOTRON, "num_hidden_layers": 9}, "auto", {}, "num_hidden_layers is 9, but block_configs has 4"),
        ({**NEMOTRON, "block_configs": [nemotron_block()] * 4}, "auto", {}, "it removes nothing"),
    ],
)
def test_bad_files(content, notation, options, message, read):
    with pytest.raises(SlebError, match=message):
        read(content, notation, **options)


def test_linear_replacements_are_no_removals(read):
    document = json.loads(json.dumps(NEMOTRON))
    document["block_configs"][0]["attention"] = {"no_op": False, "replace_with_linear": True}
    with pytest.raises(LayerMapError, match=r"block_configs\[0\].attention is replaced by a linear layer"):
        read(document)


def test_lists_of_what_is_kept_are_not_taken_for_what_goes(read):
    """LLM-Drop writes reserved_layers.json, a bare list too, of the blocks that stay."""
    with pytest.raises(LayerMapError, match="lists the blocks that LLM-Drop keeps"):
        read("[0, 1, 2]", name="reserved_layers.json", num_blocks=4)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(LayerMapError, match=r"there is no file .*nothing\.json"):
        import_map(tmp_path / "nothing.json")
    (tmp_path / "bytes").write_bytes(b"\xff\x04\x95")
    with pytest.raises(LayerMapError, match="is no text"):
        import_map(tmp_path / "bytes")


def test_a_deep_nest_is_not_followed(read):
    for notation in ("auto", "blockpruner", "mergekit"):
        with pytest.raises(LayerMapError):
            read("[" * 100_000, notation, num_blocks=4)


def test_the_model_gives_name_blocks_and_fingerprint(read, tiny_model):
    model = tiny_model("qwen3")
    layer_map, _ = read("[3, 1]", model=str(model.path))
    spec = resolve_spec(model.path)
    assert (layer_map.model, layer_map.num_blocks) == ("qwen3", 5)
    layer_map.check_model(num_blocks=5, fingerprint=spec.fingerprint)
    assert layer_map.fingerprint == spec.fingerprint
    with pytest.raises(LayerMapError, match="the file says 32, the model says 5"):
        read(SLEB_RESULT, model=str(model.path))
    # A merge names its model: a folder on this machine is looked into.
    text = (
        f"slices: [{{sources: [{{model: {model.path}, layer_range: [1, 4]}}]}}]\nmerge_method: passthrough\n"
    )
    assert units(read(text)[0]) == ["0", "4"]


@pytest.mark.parametrize("notation", ["removal-list", "llama.cpp"])
def test_notations_of_blocks_refuse_parts(notation, tiny_model):
    layer_map = LayerMap("m", None, NUM_BLOCKS, removed=(Unit(3), Unit(1, "mlp"), Unit(2, "attention")))
    with pytest.raises(ConfigError, match=r"depth 3 removes 1\.mlp, 2\.attention: use"):
        export_model(str(tiny_model("llama").path), notation, layer_map=layer_map)
    assert export_model(str(tiny_model("llama").path), notation, layer_map=layer_map, depth=1)[1]


@pytest.mark.parametrize("name", ["smollm3", "qwen2-window"])
def test_llama_cpp_goes_by_the_numbers_of_blocks(name, tiny_model):
    layer_map = LayerMap("m", None, NUM_BLOCKS, removed=(Unit(3),))
    with pytest.raises(ConfigError, match="by a block's number"):
        export_model(str(tiny_model(name).path), "llama.cpp", layer_map=layer_map)


def test_scales_do_not_remove_parts_of_a_model_with_norms_last(tiny_model):
    layer_map = LayerMap("m", None, NUM_BLOCKS, removed=(Unit(3), Unit(1, "mlp")))
    path = str(tiny_model("opt-350m").path)
    with pytest.raises(ConfigError, match="norms after the residual add"):
        export_model(path, "mergekit", layer_map=layer_map)
    assert export_model(path, "mergekit", layer_map=layer_map, depth=1)[1]


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (0, "depth 0 removes nothing"),
        (9, "not in the layer map"),
        (5, "removes every block"),
        (-1, "choose 1 to 5"),
    ],
)
def test_depths_that_cannot_be_exported(depth, message, tiny_model):
    layer_map = LayerMap("m", None, NUM_BLOCKS, removed=tuple(map(Unit, range(NUM_BLOCKS))))
    with pytest.raises(ConfigError, match=message):
        export_model(str(tiny_model("llama").path), "removal-list", layer_map=layer_map, depth=depth)


def test_a_map_of_another_model_is_refused(tiny_model):
    with pytest.raises(LayerMapError, match="use a map found on"):
        export_model(
            str(tiny_model("llama").path), "removal-list", layer_map=LayerMap("m", None, 9, (Unit(1),))
        )
    with pytest.raises(ConfigError, match="comes with no layer map: name one with --layer-map"):
        export_model(str(tiny_model("llama").path), "removal-list")


def test_a_hub_model_is_not_downloaded_for_a_list(tiny_model, monkeypatch):
    asked = []

    def fetch(repository, file):
        asked.append((repository, file))
        return str(tiny_model("llama").path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    layer_map = LayerMap("m", None, NUM_BLOCKS, removed=(Unit(3),))
    _, text = export_model("someone/llama", "mergekit", layer_map=layer_map)
    assert "model: someone/llama\n" in text
    assert asked == [("someone/llama", "config.json")]
    monkeypatch.undo()
    with pytest.raises(ModelError, match="not in the local cache"):
        export_model("someone/else", "mergekit", layer_map=layer_map)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("700", 700), ("2k", 2000), ("9G", 9 * 10**9)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "GB", "-1GB", "5TB", "5 gigs", "nan", "0.1"])
def test_bad_sizes(text):
    with pytest.raises(ConfigError, match="must be like 5GB, 500MB"):
        parse_size(text)


# --- the commands


@pytest.fixture
def run(monkeypatch):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sleb", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return call


def test_the_commands(run, capsys, tiny_model, tmp_path):
    model = tiny_model("llama").path
    (tmp_path / "list.txt").write_text("[3, 1, 2]")
    target = tmp_path / "map.json"
    assert run("import", tmp_path / "list.txt", "--model", model, "-o", target) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "llama, 5 blocks, without 3, 1, 2" in captured.err
    assert units(LayerMap.load(target)) == ["3", "1", "2"]

    assert run("export", model, "--layer-map", target, "--depth", 2, "--format", "removal-list") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("[3, 1]\n", "")
    output = tmp_path / "again.json"
    again = ("export", model, "--layer-map", target, "--format", "llm-drop", "-o", output)
    assert run(*again) == 0
    assert json.loads(output.read_text())["drop_attn_list"] == [3, 1, 2]
    capsys.readouterr()

    assert run(*again) == 2
    assert f"output {output} exists: replace it with --force" in capsys.readouterr().err
    assert run(*again, "--force") == 0
    assert run("import", output, "--num-blocks", 5, "-o", target) == 2
    assert "exists: replace it with --force" in capsys.readouterr().err
    assert run("import", output, "--num-blocks", 5, "-o", target, "--force") == 0
    assert run("import", output, "--num-blocks", 5, "-o", tmp_path) == 2
    assert "is a folder: name a file in it" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


def test_every_format_is_in_the_help(run, capsys):
    for command, formats in (("export", EXPORT_FORMATS), ("import", IMPORT_FORMATS)):
        assert run(command, "--help") == 0
        shown = capsys.readouterr().out
        assert all(each in shown for each in formats)
