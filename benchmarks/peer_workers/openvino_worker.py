"""OpenVINO GenAI with continuous batching, on a folder that optimum-cli has exported."""

from __future__ import annotations

import importlib
import time
from importlib.metadata import version
from typing import Any


class Engine:
    """A continuous batching pipeline on the CPU."""

    def __init__(self, model: str, threads: int, max_context: int, max_batch: int, kv_gib: int) -> None:
        # By name: a peer is no dependency of this package, and its environment has this package not.
        openvino = self._openvino = importlib.import_module("openvino")
        genai = self._genai = importlib.import_module("openvino_genai")
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = kv_gib
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = max_batch
        scheduler.max_num_batched_tokens = max(2048, max_context)
        properties = {"INFERENCE_PRECISION_HINT": openvino.Type.bf16, "INFERENCE_NUM_THREADS": threads}
        self._pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        core = openvino.Core()
        capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.facts: dict[str, Any] = {
            "version": version("openvino-genai"),
            # The hint is for processors that can.
            "dtype": "bfloat16" if "BF16" in capabilities else "float32",
            "attention": "paged",
            "compiled": "by its CPU plugin",
            "threads": threads,
            "settings": {
                "prefix_caching": False,
                "scheduler": "continuous batching",
                "kv_cache_gib": kv_gib,
                "kv_cache_dtype": _kv_precision(core, model),
            },
        }

    def run(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Seconds to answer `prompts`, each with max_tokens tokens, and those of the first answer."""
        import numpy

        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        inputs = [self._openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in prompts]
        started = time.perf_counter()
        results = self._pipeline.generate(inputs, [config] * len(inputs))
        seconds = time.perf_counter() - started
        answers = [list(result.m_generation_ids[0]) for result in results]
        return {"seconds": seconds, "num_tokens": sum(map(len, answers)), "token_ids": answers[0]}


def _kv_precision(core: Any, model: str) -> str | None:
    """What keys and values are kept in: as the model's own options say, which optimum-cli writes, else by default.

    None where neither is told.
    """
    option = ["runtime_options", "KV_CACHE_PRECISION"]
    try:
        read = core.read_model(f"{model}/openvino_model.xml")
        if read.has_rt_info(option):
            return str(read.get_rt_info(option).value)
        return str(core.get_property("CPU", "KV_CACHE_PRECISION").get_type_name())
    except (RuntimeError, AttributeError):
        return None
