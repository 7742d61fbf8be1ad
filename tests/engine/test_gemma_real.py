"""Gemma 3 270M in float32 against transformers, and what is read of its file: minutes, and a first download."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sleb import LLM, SamplingParams
from sleb.benchmarks.quality.evaluate import run_eval
from sleb.benchmarks.quality.options import EvalOptions
from sleb.models.aliases import ALIASES, fetch_gguf
from sleb.models.resolve import resolve_model

TEXT = Path(__file__).resolve().parents[2] / "CHANGELOG.md"
BOS, SEQLEN, WINDOWS = 2, 768, 4  # windows of text that are longer than the model's sliding ones, 512
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Q: What is 17 + 25?\nA:",
    "Die Würde des Menschen",
    "A",
    "The theory of evolution by natural selection, first formulated in Darwin's book in 1859, " * 30,
    "<start_of_turn>user\nName three colours.<end_of_turn>\n<start_of_turn>model\n",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def all_threads() -> Iterator[None]:
    """The other tests run on one thread; this model is worth all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import AutoModelForCausalLM

    path = resolve_model("gemma3-270m").path
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch_gguf(ALIASES["gemma3-270m"], tmp_path_factory.mktemp("gguf"))


def test_64_greedy_tokens_of_8_prompts_are_those_of_transformers(reference: Any) -> None:
    """In one batch: each token is transformers' choice after those before it, by one forward over them all."""
    llm = LLM("gemma3-270m", layer_map="none", dtype="float32", max_model_len=1024)
    greedy = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    for output in llm.generate(PROMPTS, greedy):
        prompt, found = output.prompt_token_ids, list(output.token_ids)
        assert prompt[0] == BOS and len(found) == 64
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + found]), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == found


def test_the_perplexity_of_a_text_is_transformers_own_with_bos(reference: Any) -> None:
    from transformers import AutoTokenizer

    options = EvalOptions(
        "gemma3-270m",
        layer_map="none",
        text=(str(TEXT),),
        seqlen=SEQLEN,
        windows=WINDOWS,
        generate=False,
        dtype="float32",
    )
    [found] = [each.value for each in run_eval(options).measurements if each.metric == "perplexity"]
    ids = AutoTokenizer.from_pretrained(resolve_model("gemma3-270m").path)(TEXT.read_text())["input_ids"]
    assert ids[0] == BOS
    text = torch.tensor(ids[1 : 1 + WINDOWS * (SEQLEN - 1)]).view(WINDOWS, SEQLEN - 1)
    begun = torch.nn.functional.pad(text, (1, 0), value=BOS)
    with torch.inference_mode():
        losses = [float(reference(row[None], labels=row[None]).loss) for row in begun]
        bare = float(reference(text[1:2], labels=text[1:2]).loss)
    assert found == pytest.approx(math.exp(sum(losses) / WINDOWS), rel=1e-3)
    assert bare > losses[1] + math.log(1.5)


def test_the_weights_are_those_of_the_file(reference: Any, gguf_file: Path) -> None:
    """Dequantised by the package gguf, by llama.cpp's names; in bf16, norms too, which the file has one larger."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 18)
    tensors = {each.name: each for each in gguf.GGUFReader(gguf_file).tensors}
    for name, found in reference.state_dict().items():
        if name == "lm_head.weight":  # the embedding
            continue
        tensor = tensors.pop(names.get_name(name, try_suffixes=(".weight",)))
        wanted = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)) - int("norm" in name)
        torch.testing.assert_close(found, wanted.bfloat16().float(), rtol=0, atol=0, msg=name)
    assert not tensors


def test_the_tokenizer_is_llama_cpp_s(gguf_file: Path) -> None:
    from tokenizers import Tokenizer

    llama_cpp: Any = pytest.importorskip("llama_cpp")
    theirs = llama_cpp.Llama(str(gguf_file), vocab_only=True, verbose=False)
    ours = Tokenizer.from_file(str(resolve_model("gemma3-270m").path / "tokenizer.json"))
    rng = random.Random(0)
    pieces = [
        *"ab cd\n\t <>/▁é日🙂\u0301\u200d\x00.,1",
        "<b>",
        "</i>",
        "<start_of_turn>",
        "<0x41>",
        "  ",
        "\n\n",
    ]
    mixed = ["".join(rng.choices(pieces, k=rng.randrange(30))) for _ in range(2000)]
    ranges = [range(32, 127), range(160, 0xD800), range(0xE000, 0x110000)]
    anything = [
        "".join(chr(rng.choice(rng.choice(ranges))) for _ in range(rng.randrange(30))) for _ in range(2000)
    ]
    for text in [TEXT.read_text(), *PROMPTS, *mixed, *anything]:
        ids = ours.encode(text).ids
        assert ids == theirs.tokenize(text.encode(), add_bos=True, special=True), text
        assert ours.decode(ids[1:], skip_special_tokens=False).encode() == theirs.detokenize(
            ids[1:], special=True
        ), text
