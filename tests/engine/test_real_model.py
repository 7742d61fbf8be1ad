"""SmolLM2-135M in float32 against transformers, with the map that ships: minutes, and a download the first time."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn

from sleb import LLM, LayerMap, SamplingParams
from sleb.layer_map.layer_map import shipped_maps

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Q: What is 17 + 25?\nA:",
    "Die Würde des Menschen",
    "A",
    "The theory of evolution by natural selection, first formulated in Darwin's book in 1859, " * 3,
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
]
DEPTHS = (0, 3, 6)
GREEDY = SamplingParams(temperature=0.0, max_tokens=128, ignore_eos=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def all_threads():
    """The other tests run on one thread; this model is worth all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llm():
    return LLM(
        "smollm2",
        layer_map=shipped_maps()["smollm2-135m-instruct"],
        tiers=DEPTHS,
        dtype="float32",
        max_model_len=512,
    )


class PatchLayer(nn.Module):
    """In a decoder's list of layers: h + W h / rms(h) + b."""

    def __init__(self, patch):
        super().__init__()
        assert patch.form == "full" and patch.normed
        self.weight, self.bias = (
            torch.from_numpy(patch.tensors[name]).float() for name in ("weight", "bias")
        )

    def forward(self, hidden_states, **kwargs):
        normed = hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + 1e-5)
        return hidden_states + normed @ self.weight.T + self.bias


@pytest.fixture(scope="module")
def reference(llm):
    """{depth: transformers model with those blocks deleted, and a patch where the last of each run was}."""
    from transformers import AutoModelForCausalLM

    from sleb.models.resolve import resolve_model

    dense = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2").path, dtype=torch.float32).eval()
    models, layer_map = {}, llm.engine.layer_map
    for depth in DEPTHS:
        gone = {unit.block for unit in layer_map.removed[:depth]}
        model = copy.copy(dense)
        model._modules = dict(dense._modules)
        model._modules["model"] = copy.copy(dense.model)
        model.model._modules = dict(dense.model._modules)
        patches = {each.last[0]: PatchLayer(each) for each in layer_map.patches_at(depth, 576)}
        assert patches.keys() <= gone
        layers = [patches.get(block, layer) for block, layer in enumerate(dense.model.layers)]
        model.model._modules["layers"] = nn.ModuleList(
            layer for block, layer in enumerate(layers) if block not in gone or block in patches
        )
        model.config = model.model.config = copy.deepcopy(dense.config)
        model.config.num_hidden_layers = len(model.model.layers)
        models[depth] = model
    return models


def assert_greedy(model, prompt_ids, token_ids):
    """Each token is transformers' choice after those before it, by one forward without a cache over them all."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt_ids + token_ids]), use_cache=False).logits[0]
    logits = logits[len(prompt_ids) - 1 : -1]
    for index, (token, row) in enumerate(zip(token_ids, logits, strict=True)):
        margin = (row.max() - row[token]).item()
        assert int(row.argmax()) == token, f"token {index} of {len(token_ids)} is behind by {margin}"


def test_the_map_is_the_one_that_ships(llm):
    layer_map = llm.engine.layer_map
    assert layer_map == LayerMap.load(shipped_maps()["smollm2-135m-instruct"])
    assert layer_map.depth == 0 and layer_map.max_depth == 10
    assert all(unit.part == "block" for unit in layer_map.removed)
    default = LLM("smollm2", max_model_len=64).engine
    assert default.layer_map == layer_map
    assert [tier.depth for tier in default.tiers] == [0, 3, 6] and default.default_tier.depth == 0


def test_128_greedy_tokens_in_one_mixed_batch_and_alone(llm, reference):
    rows = [(prompt, depth) for prompt in PROMPTS for depth in DEPTHS]
    mixed = llm.generate([prompt for prompt, _ in rows], GREEDY, [depth for _, depth in rows])
    for output in mixed:
        assert len(output.token_ids) == 128
        assert_greedy(reference[output.depth], output.prompt_token_ids, output.token_ids)
    for (prompt, depth), output in zip(rows, mixed, strict=True):
        assert llm.generate([prompt], GREEDY, depth)[0].token_ids == output.token_ids
    llm.engine.check_integrity()


def test_logits_within_1e_4(llm, reference):
    """Log-probabilities of a paragraph, chunked and whole."""
    ids = llm.engine.encode(PROMPTS[6])
    for depth in DEPTHS:
        with torch.inference_mode():
            logprobs = reference[depth](torch.tensor([ids]), use_cache=False).logits[0].log_softmax(dim=-1)
        expected = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        torch.testing.assert_close(llm.score(ids, depth=depth), expected, atol=1e-4, rtol=0)


def changed_folder(tmp_path, **changes):
    """The model's folder with fields of its files changed: {name of a file: change of its JSON}."""
    import json
    import shutil

    from sleb.models.resolve import resolve_model

    folder = shutil.copytree(resolve_model("smollm2").path, tmp_path / "model", copy_function=os.symlink)
    for name, fields in changes.items():
        file = folder / f"{name}.json"
        content = json.loads(file.read_text()) | fields
        file.unlink()  # it is a link
        file.write_text(json.dumps(content))
    return folder


def test_a_limit_in_the_tokenizer_s_file_cuts_no_conversation(tmp_path, llm):
    from transformers import AutoTokenizer

    question = "The rest are words: " + "river stone cloud " * 85 + " What is the capital of France?"
    messages = [{"role": "user", "content": question}]
    wanted = AutoTokenizer.from_pretrained(changed_folder(tmp_path / "as it is")).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    limit = {"max_length": 128, "direction": "Right", "strategy": "LongestFirst", "stride": 0}
    cut = LLM(changed_folder(tmp_path, tokenizer={"truncation": limit}), dtype="float32", max_model_len=512)
    prompt = cut.engine.render_chat(messages)
    assert prompt == wanted and len(prompt) > 256
    [output] = cut.generate([prompt], SamplingParams(temperature=0.0, max_tokens=16))
    assert "Paris" in output.text


def test_an_answer_ends_with_its_turn_though_the_generation_config_names_another_end(tmp_path):
    folder = changed_folder(tmp_path, generation_config={"eos_token_id": 0})
    llm = LLM(folder, dtype="float32", max_model_len=512)
    prompt = llm.engine.render_chat([{"role": "user", "content": "What is the capital of France?"}])
    [output] = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=128))
    assert output.finish_reason == "stop" and "Paris" in output.text and "user" not in output.text
