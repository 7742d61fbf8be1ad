"""One engine in a process of its own, driven by JSON lines: the worker of `sleb bench peers`.

    python adapters.py NAME < lines

The first loads the engine, by the arguments of its class, and is answered by its facts; each further one, {"prompts":
…, "max_tokens": …}, by the seconds that it took. It is run by each engine's own interpreter, which has this package
not: an adapter imports what it is for and nothing else. All are set alike: bfloat16, greedy, the end of a sequence
ignored, no prefix cache. What libraries print goes to standard error: vLLM writes its log to standard output.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from importlib.metadata import version
from typing import Any

Prompts = list[list[int]]
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Ours:
    """sleb, at one depth of a model or several. options: of LLM."""

    def __init__(self, model: str, **options: Any) -> None:
        from sleb.engine.llm import LLM
        from sleb.version import __version__

        self._llm = LLM(model, prefix_caching=False, **options)
        kernels = self._llm.engine.runner.description
        self.facts = {"version": __version__, "dtype": "bfloat16", "kernels": kernels}

    def generate(self, prompts: Prompts, max_tokens: int, depth: int = 0) -> Prompts:
        from sleb.engine.requests.sampling_params import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        return [list(output.check().token_ids) for output in self._llm.generate(prompts, params, depth)]


class Transformers:
    """transformers' own generate(), eager, with PyTorch's attention. Its cache has no limit."""

    def __init__(self, model: str, threads: int, max_context: int, max_batch: int, kv_gib: int) -> None:
        torch, transformers = map(importlib.import_module, ("torch", "transformers"))
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self._torch, self._model = torch, loaded.eval()
        # None of the model's own: a penalty would cost time that other engines do not spend, and without the token
        # that ends a sequence none ends early.
        self._model.generation_config = transformers.GenerationConfig()
        self.facts = {"version": transformers.__version__, "dtype": "bfloat16", "attention": "sdpa"}

    def generate(self, prompts: Prompts, max_tokens: int) -> Prompts:
        inputs = self._torch.tensor(prompts)
        lengths = {"max_new_tokens": max_tokens, "min_new_tokens": max_tokens}
        outputs = self._model.generate(
            inputs, attention_mask=self._torch.ones_like(inputs), do_sample=False, pad_token_id=0, **lengths
        )
        answers: Prompts = outputs[:, inputs.shape[1] :].tolist()
        return answers


class Vllm:
    """Offline vLLM on a CPU, compiled as it comes; the parent has set the variables that its CPU backend wants."""

    def __init__(self, model: str, threads: int, max_context: int, max_batch: int, kv_gib: int) -> None:
        self._vllm = importlib.import_module("vllm")
        room = {"max_model_len": max_context, "max_num_seqs": max_batch}
        self._llm = self._vllm.LLM(
            model=model, dtype="bfloat16", enable_prefix_caching=False, disable_log_stats=True, **room
        )
        self.facts = {"version": self._vllm.__version__, "dtype": "bfloat16"}

    def generate(self, prompts: Prompts, max_tokens: int) -> Prompts:
        params = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


class OpenVino:
    """OpenVINO GenAI with continuous batching on the CPU, on a folder that optimum-cli has exported."""

    def __init__(self, model: str, threads: int, max_context: int, max_batch: int, kv_gib: int) -> None:
        openvino = self._openvino = importlib.import_module("openvino")
        genai = self._genai = importlib.import_module("openvino_genai")
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size, scheduler.enable_prefix_caching = kv_gib, False
        scheduler.max_num_seqs, scheduler.max_num_batched_tokens = max_batch, max(2048, max_context)
        properties = {"INFERENCE_PRECISION_HINT": openvino.Type.bf16, "INFERENCE_NUM_THREADS": threads}
        self._pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        # The hint is for processors that can.
        has_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        dtype = "bfloat16" if has_bf16 else "float32"
        self.facts = {"version": version("openvino-genai"), "dtype": dtype}

    def generate(self, prompts: Prompts, max_tokens: int) -> Prompts:
        import numpy

        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = max_tokens
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        inputs = [self._openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in prompts]
        results = self._pipeline.generate(inputs, [config] * len(inputs))
        return [list(result.m_generation_ids[0]) for result in results]


ADAPTERS = {"sleb": Ours, "transformers": Transformers, "vllm": Vllm, "openvino": OpenVino}


def main(name: str) -> None:
    """Answers requests until the input ends."""
    # Copies that children do not inherit: one that reads or prints cannot break the protocol.
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    engine: Any = None
    for line in requests:
        try:
            request = json.loads(line)
            if engine is None:
                engine = ADAPTERS[name](**request)
                told = engine.facts
            else:
                started = time.perf_counter()
                outputs = engine.generate(**request)
                told = {"seconds": time.perf_counter() - started}
                lengths = [len(each) for each in outputs]
                if lengths != [request["max_tokens"]] * len(request["prompts"]):
                    raise RuntimeError(f"gave answers of {set(lengths)} tokens, not {request['max_tokens']}")
        except Exception as error:
            traceback.print_exc()
            told = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(told) + "\n")
        answers.flush()


if __name__ in (
    "__main__",
    "__mp_main__",
):  # the second: a process that the engine starts in turn, as vLLM does
    # The system is to kill this process when its parent ends: stopped, or in a run, it sees no end of its input.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
if __name__ == "__main__":
    del sys.path[0]  # where modules lie with names that libraries have too
    if sys.argv[1] == "exec":  # a program that is to die with its parent
        os.execv(sys.argv[2], sys.argv[2:])
    main(sys.argv[1])
