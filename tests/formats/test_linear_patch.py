"""LinearPatch's matrices and ReplaceMe's checkpoints, made by the formulas of their authors' code."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sleb import LLM
from sleb.errors import LayerMapError
from sleb.formats.importing import import_map
from sleb.layer_map.layer_map import LayerMap, Unit

PROMPT = torch.randint(3, 96, (29,), generator=torch.Generator().manual_seed(7)).tolist()
OPTIONS = {"page_size": 4, "dtype": "float32", "device": "cpu", "kernels": "torch", "max_num_seqs": 4}


def scales(*, trained=False, start=1, end=3, width=32):
    """As main_distill.py saves them: H diag(s) Hᵀ, symmetric until it is trained."""
    generator = torch.Generator().manual_seed(3)
    hadamard = torch.ones(1, 1)
    while len(hadamard) < width:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    hadamard /= width**0.5
    factors = 1 + 0.4 * torch.rand(width, generator=generator)
    weight = hadamard @ torch.diag(factors) @ hadamard.T
    if trained:
        weight += 0.1 * torch.randn(width, width, generator=generator)
    return {
        "scale_params": factors,
        "symmetric_weight": weight,
        "start_l": start,
        "end_l": end,
        "rotate": True,
    }


def write(path, found):
    """As the command in the error about pickles converts them."""
    save_file({name: torch.as_tensor(value).contiguous() for name, value in found.items()}, path)
    return path


@pytest.mark.parametrize("trained", [False, True])
def test_a_linear_patch_is_served_as_its_authors_run_it(trained, tiny_model, tmp_path):
    """Blocks left out of transformers' model, and a hook that multiplies, with tokens as rows."""
    model, found = tiny_model("llama-gqa"), scales(trained=trained)
    notes = []
    file = write(tmp_path / "scales.safetensors", found)
    layer_map = import_map(file, model=str(model.path), note=notes.append)
    assert layer_map.removed == (Unit(1), Unit(2)) and "depths between have none" in notes[0]
    layer_map.save(tmp_path / "map.json")
    reference = model.without((1, 2)).model
    reference.model.layers[0].register_forward_hook(
        lambda module, _, output: output @ found["symmetric_weight"]
    )
    with torch.inference_mode():
        logits = reference(torch.tensor([PROMPT]), use_cache=False).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(PROMPT[1:])[:, None]).squeeze(1)
    llm = LLM(model.path, LayerMap.load(tmp_path / "map.json"), [2], **OPTIONS)
    torch.testing.assert_close(llm.score(PROMPT, depth=2), expected, atol=2e-3, rtol=0)  # stored as float16


class Touch:
    """Something that a pickle runs when it is opened."""

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("notation", ["auto", "linearpatch", "removal-list"])
def test_pickles_are_never_opened(notation, zipped, tmp_path):
    bomb = Touch()
    bomb.path = tmp_path / "ran"
    torch.save({**scales(), "bomb": bomb}, tmp_path / "scales.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        LayerMapError,
        match=r"is a pickle, which is never opened here.* becomes a safetensors file by: python",
    ):
        import_map(tmp_path / "scales.pt", notation, num_blocks=5)
    assert [file.name for file in tmp_path.iterdir()] == ["scales.pt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"symmetric_weight": torch.ones(32, 31)}, "symmetric_weight has the shape"),
        ({"symmetric_weight": torch.ones(32, 32, dtype=torch.int64)}, "it must be a square matrix of floats"),
        ({"symmetric_weight": torch.full((32, 32), torch.nan)}, "values that are not finite numbers"),
        ({"start_l": 0}, "start_l is 0; it must be an integer from 1"),
        ({"end_l": 1}, "end_l is 1; it must be an integer from 2"),
        ({"end_l": torch.ones(3)}, "end_l is missing"),
        ({"end_l": 9}, "unit 5 in removed is not in the model"),
        ({"end_l": None}, "it holds no end_l, which LinearPatch writes"),
    ],
)
def test_what_is_no_linear_patch(change, message, tmp_path):
    found = {name: value for name, value in (scales() | change).items() if value is not None}
    with pytest.raises(LayerMapError, match=message):
        import_map(write(tmp_path / "scales.safetensors", found), num_blocks=5)


def test_a_checkpoint_of_replaceme_is_a_model_as_it_is(tiny_model, tmp_path):
    """lstsq.py: blocks left out, and the projection before them multiplied by the transposed transform."""
    reference = tiny_model("llama-gqa").without((2, 3))
    transform = np.eye(32) + 0.1 * np.random.default_rng(0).normal(size=(32, 32))
    down = reference.model.model.layers[1].mlp.down_proj
    down.weight.data = (torch.from_numpy(transform).T @ down.weight.double()).float()
    reference.model.save_pretrained(tmp_path / "model")
    with pytest.raises(LayerMapError, match=r"names nothing that is removed.* is a MODEL as it is"):
        import_map(tmp_path / "model")
    expected = reference.logprobs(PROMPT)[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None]).squeeze(1)
    torch.testing.assert_close(LLM(tmp_path / "model", **OPTIONS).score(PROMPT), expected, atol=1e-4, rtol=0)
    assert json.loads((tmp_path / "model/config.json").read_text())["num_hidden_layers"] == 3
