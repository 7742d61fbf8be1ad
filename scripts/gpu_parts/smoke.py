"""Two blocks of LLaMA 2 7B's shape with random weights: does it start, and is what it computes right?

Each dtype is a process of its own, so that one that crashes leaves the others. Depth 1 leaves out the second block's
MLP, depth 2 its attention too; each has a patch in its place.
"""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from gpu_parts.job import Checks, Job
from sleb import LLM, SamplingParams
from sleb.engine.execute.cuda_graphs import decode_buckets
from sleb.engine.model.allocation import all_sublayers, allocate
from sleb.engine.model.architecture import resolve_spec
from sleb.layer_map.layer_map import LayerMap, Patch, Patches, Unit
from sleb.models.shapes import shape_folder

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
_DEVIATION = 0.02
_TIERS = (0, 1, 2)
_REMOVED = (Unit(1, "mlp"), Unit(1, "attention"))
# Allowed mean difference of log-probabilities to float32 on the CPU; of quantised weights, to torch's operators.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "int8": 1e-3, "int4": 1e-3}


def shape(job: Job, folder: Path, num_blocks: int, name: str = "llama-2-7b") -> Path:
    """A folder with the config of so many blocks of the shape; tiny in a dry run."""
    config = json.loads((shape_folder(name) / "config.json").read_text("utf-8"))
    config |= {"num_hidden_layers": num_blocks, **(TINY if job.dry else {})}
    folder = folder / f"{name}-{num_blocks}"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def patched(layer_map: LayerMap, width: int) -> LayerMap:
    """The map with a small random patch in place of every unit, as its removal leaves it."""
    rng = np.random.default_rng(0)

    def patch(depth: int, unit: Unit) -> Patch:
        tensors = {
            "weight": rng.normal(0, _DEVIATION, (width, width)).astype(np.float16),
            "bias": rng.normal(0, _DEVIATION, width).astype(np.float16),
        }
        return Patch(unit.sublayers[0], unit.sublayers[-1], depth, None, "full", True, tensors)

    patches = Patches.of(patch(depth, unit) for depth, unit in enumerate(layer_map.removed, 1))
    return replace(layer_map, patches=patches)


def smoke(job: Job) -> int:
    """Exit status 1 if something is not as it must be."""
    format_ = job.name.removeprefix("smoke-")
    with tempfile.TemporaryDirectory() as folder:
        return _Smoke(job, format_, shape(job, Path(folder), 2)).run()


class _Smoke:
    def __init__(self, job: Job, format_: str, folder: Path) -> None:
        self.job, self.format, self.folder = job, format_, folder
        self.spec = resolve_spec(folder)
        dtype = torch.bfloat16 if format_ == "bfloat16" else torch.float32
        self.checks = Checks(job, "gpu smoke", dtype)
        rng, lengths = random.Random(0), (3, 20, 1) if job.dry else (3, 50, 17, 1, 130)
        self.prompts = [rng.choices(range(3, self.spec.vocab_size), k=length) for length in lengths]
        self.depths = [2, 0, 1, 0, 2][: len(lengths)]
        self.num_tokens = 3 if job.dry else 16
        self.greedy = self.params(temperature=0.0)

    def params(self, **fields: Any) -> SamplingParams:
        return SamplingParams(max_tokens=self.num_tokens, ignore_eos=True, **fields)

    def make(self, graphs: bool = False, **options: Any) -> LLM:
        """An engine on the GPU; in a dry run interpreted, and what would be captured is called."""
        removed = LayerMap(model="smoke", fingerprint=None, num_blocks=2, removed=_REMOVED)
        layer_map = patched(removed, self.spec.hidden_size)
        defaults = {
            "device": self.job.device,
            "kernels": "triton",
            "dtype": "bfloat16" if self.format == "bfloat16" else "float32",
            "max_num_seqs": 8,
            "kv_cache_memory": 0.01 if self.job.dry else 0.5,
            "cuda_graphs": graphs,
            "seed": 0,
        }
        llm = LLM(self.folder, layer_map, _TIERS, **(defaults | options))
        if self.job.dry and graphs:
            llm.engine.runner.executor.capture(decode_buckets(8), lambda function: function)
        return llm

    def run(self) -> int:
        if self.format in ("int8", "int4"):
            self.quantised()
        else:
            self.plain()
        return self.checks.finish()

    def write_weights(self) -> None:
        """Random weights as a checkpoint, made where the GPU is: both sides read them."""
        device = torch.device(self.job.device)
        generator = torch.Generator(device).manual_seed(0)
        tensors = {}
        _, targets = allocate(self.spec, all_sublayers(self.spec), torch.bfloat16, torch.device("meta"))
        for name, target in targets.items():
            made = torch.empty(target.stored_shape, device=device).normal_(0, _DEVIATION, generator=generator)
            tensors[name] = (made + (made.dim() == 1)).to("cpu", torch.bfloat16).contiguous()
        save_file(tensors, self.folder / "model.safetensors", {"format": "pt"})

    def plain(self) -> None:
        """float32, or bfloat16, beside torch's operators in float32 on the CPU."""
        self.write_weights()
        reference = self.make(device="cpu", kernels="torch", dtype="float32")
        wanted = reference.generate(self.prompts, self.greedy, self.depths)
        scores = [reference.score(self.prompts[1], depth) for depth in _TIERS]
        del reference
        for graphs in (False, True):
            case = f"{self.format}, graphs {'on' if graphs else 'off'}"
            llm = self.make(graphs)
            for depth, score in zip(_TIERS, scores, strict=True):
                found = llm.score(self.prompts[1], depth)
                self.checks.close(case, f"depth {depth}", found, score, _TOLERANCE[self.format])
            outputs = llm.generate(self.prompts, self.greedy, self.depths)
            if self.format == "float32":
                tokens = [[each.token_ids for each in some] for some in (outputs, wanted)]
                self.checks.equal(case, "greedy, mixed and patched depths", *tokens)
            self.sampled(llm, case)
            llm.engine.check_integrity()
            del llm

    def sampled(self, llm: LLM, case: str) -> None:
        """With a seed, the same tokens again, alone and in a batch of the same depth."""
        params = self.params(temperature=0.9, top_k=40, top_p=0.9, seed=3)
        first, again = (llm.generate(self.prompts, params, 0) for _ in range(2))
        tokens = [[each.token_ids for each in some] for some in (first, again)]
        self.checks.equal(case, "sampled with a seed, again", *tokens)
        in_range = all(0 <= token < self.spec.vocab_size for each in tokens[0] for token in each)
        self.checks.equal(case, "sampled tokens are in the vocabulary", [in_range], [True])

    def quantised(self) -> None:
        """int8 or int4 beside torch's operators on the same weights and device."""
        options = {"weights": self.format, "load_format": "dummy"}
        reference = self.make(**options, kernels="torch")
        scores = [reference.score(self.prompts[1], depth) for depth in _TIERS]
        del reference
        for graphs in (False, True):
            case = f"{self.format}, graphs {'on' if graphs else 'off'}"
            llm = self.make(graphs, **options)
            for depth, score in zip(_TIERS, scores, strict=True):
                found = llm.score(self.prompts[1], depth)
                self.checks.close(case, f"depth {depth}", found, score, _TOLERANCE[self.format])
            outputs = llm.generate(self.prompts, self.greedy, self.depths)
            lengths = [len(each.token_ids) for each in outputs]
            self.checks.equal(case, "answers are whole", lengths, [self.num_tokens] * len(lengths))
            self.sampled(llm, case)
            del llm


def memcheck(job: Job) -> int:
    """A few steps of a tiny model, for compute-sanitizer to watch: prompts, decode steps, mixed depths, sampling."""
    small = Job(job.name, job.out, job.seconds, job.dry)
    with tempfile.TemporaryDirectory() as folder:
        watched = _Smoke(small, "bfloat16", _tiny(Path(folder)))
        llm = watched.make(load_format="dummy")
        outputs = llm.generate(watched.prompts, watched.params(temperature=0.9, seed=3), watched.depths)
        lengths = [len(each.token_ids) for each in outputs]
        watched.checks.equal("memcheck", "answers are whole", lengths, [watched.num_tokens] * len(lengths))
    return watched.checks.finish()


def _tiny(folder: Path) -> Path:
    return shape(Job("tiny", folder, 0.0, True), folder, 2)
