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
from sleb.engine.execute.cuda_graphs import decode_buckets, prompt_buckets
from sleb.engine.model.allocation import all_sublayers, allocate
from sleb.engine.model.architecture import resolve_spec
from sleb.layer_map.layer_map import LayerMap, Patch, Patches, Unit
from sleb.models.shapes import shape_folder

_TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
_TINY |= {"num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256}
_DEVIATION = 0.02  # of random weights
_TIERS = (0, 1, 2)
# Mean difference of log-probabilities to float32 on the CPU; of quantised weights, to torch on the GPU.
_ALLOWED = {"float32": 1e-3, "bfloat16": 0.05, "int8": 1e-3, "int4": 1e-3}


def shape(folder: str, num_blocks: int, name: str = "llama-2-7b", *, tiny: bool) -> Path:
    """A folder with the config of so many blocks of a shape."""
    config = json.loads((shape_folder(name) / "config.json").read_text("utf-8"))
    config |= {"num_hidden_layers": num_blocks, **(_TINY if tiny else {})}
    made = Path(folder) / f"{name}-{num_blocks}"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(config), "utf-8")
    return made


def patched(layer_map: LayerMap, width: int) -> LayerMap:
    """The map with a random patch in place of every unit that it removes."""
    rng, patches = np.random.default_rng(0), list[Patch]()
    for depth, unit in enumerate(layer_map.removed, 1):
        shapes = {"weight": (width, width), "bias": (width,)}
        tensors = {name: rng.normal(0, _DEVIATION, size).astype(np.float16) for name, size in shapes.items()}
        first, *_, last = *unit.sublayers, unit.sublayers[-1]
        patches.append(Patch(first, last, depth, None, "full", True, tensors))
    return replace(layer_map, patches=Patches.of(patches))


def smoke(job: Job) -> int:
    """Exit status 1 if something is not as it must be."""
    with tempfile.TemporaryDirectory() as folder:
        return _Smoke(job, job.name.removeprefix("smoke-"), shape(folder, 2, tiny=job.dry)).run()


def memcheck(job: Job) -> int:
    """A few steps of a tiny model, for compute-sanitizer to watch: prompts, decode steps, mixed depths, sampling."""
    with tempfile.TemporaryDirectory() as folder:
        watched = _Smoke(job, "bfloat16", shape(folder, 2, tiny=True))
        watched.sampled(watched.make(False, load_format="dummy"), "memcheck")
    return watched.checks.finish()


class _Smoke:
    def __init__(self, job: Job, kind: str, folder: Path) -> None:
        self.job, self.kind, self.folder, self.spec = job, kind, folder, resolve_spec(folder)
        self.dtype = "bfloat16" if kind == "bfloat16" else "float32"
        self.checks = Checks(job, "gpu smoke", getattr(torch, self.dtype))
        rng, lengths = random.Random(0), (3, 20, 1) if job.dry else (3, 50, 17, 1, 130)
        self.prompts = [rng.choices(range(3, self.spec.vocab_size), k=length) for length in lengths]
        self.depths = [2, 0, 1, 0, 2][: len(lengths)]
        self.num_tokens = 3 if job.dry else 16

    def make(self, graphs: bool, **options: Any) -> LLM:
        """An engine on the GPU; in a dry run interpreted, and what would be captured is called."""
        removed = (Unit(1, "mlp"), Unit(1, "attention"))
        layer_map = LayerMap(model="smoke", fingerprint=None, num_blocks=2, removed=removed)
        defaults: dict[str, Any] = {
            "device": self.job.device,
            "kernels": "triton",
            "dtype": self.dtype,
            "seed": 0,
        }
        defaults |= {
            "max_num_seqs": 8,
            "kv_cache_memory": 0.01 if self.job.dry else 0.5,
            "cuda_graphs": graphs,
        }
        llm = LLM(self.folder, patched(layer_map, self.spec.hidden_size), _TIERS, **(defaults | options))
        if self.job.dry and graphs:
            executor: Any = llm.engine.runner.executor
            executor.capture(decode_buckets(8), lambda function: function, prompts=prompt_buckets(64))
        return llm

    def tokens(self, llm: LLM, depths: Any, **params: Any) -> list[list[int]]:
        sampling = SamplingParams(max_tokens=self.num_tokens, ignore_eos=True, **params)
        return [output.token_ids for output in llm.generate(self.prompts, sampling, depths)]

    def run(self) -> int:
        """Without and with graphs, beside torch's operators."""
        options = {"weights": self.kind, "load_format": "dummy"} if self.kind.startswith("int") else {}
        if options:  # the same random weights, in the same format and place
            reference = self.make(False, **options, kernels="torch")
        else:
            self.write_weights()
            reference = self.make(False, device="cpu", kernels="torch", dtype="float32")
        wanted = self.tokens(reference, self.depths, temperature=0.0)
        scores = [reference.score(self.prompts[1], depth) for depth in _TIERS]
        del reference
        for graphs in (False, True):
            case = f"{self.kind}, graphs {'on' if graphs else 'off'}"
            llm = self.make(graphs, **options)
            for depth, score in zip(_TIERS, scores, strict=True):
                off = float((llm.score(self.prompts[1], depth) - score).abs().mean())
                self.checks.add(case, f"depth {depth}", "nats, mean difference", off, _ALLOWED[self.kind])
            found = self.tokens(llm, self.depths, temperature=0.0)
            if self.dtype == "float32":
                self.checks.equal(case, "greedy, mixed and patched depths", found, wanted)
            self.sampled(llm, case)
        return self.checks.finish()

    def write_weights(self) -> None:
        """Random weights as a checkpoint, made where the GPU is: both sides read them."""
        device, tensors = torch.device(self.job.device), {}
        generator = torch.Generator(device).manual_seed(0)
        _, targets = allocate(self.spec, all_sublayers(self.spec), torch.bfloat16, torch.device("meta"))
        for name, target in targets.items():
            made = torch.empty(target.stored_shape, device=device).normal_(0, _DEVIATION, generator=generator)
            tensors[name] = (made + (made.dim() == 1)).to("cpu", torch.bfloat16)  # a norm's are near 1
        save_file(tensors, self.folder / "model.safetensors", {"format": "pt"})

    def sampled(self, llm: LLM, case: str) -> None:
        """With a seed the same tokens again, in mixed depths; each is one of the vocabulary."""
        params = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 3}
        first, again = (self.tokens(llm, self.depths, **params) for _ in range(2))
        self.checks.equal(case, "sampled with a seed, again", first, again)
        inside = [len(each) == self.num_tokens and max(each) < self.spec.vocab_size for each in first]
        self.checks.equal(case, "whole, of the vocabulary", inside, [True] * len(inside))
        llm.engine.check_integrity()
