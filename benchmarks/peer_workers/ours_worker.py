"""sleb, at depth 0 of a model."""

from __future__ import annotations

import time
from typing import Any

from sleb.benchmarks.environment import describe_environment
from sleb.benchmarks.ideal import DepthCost, decode_bytes
from sleb.engine.llm import LLM
from sleb.engine.sampling_params import SamplingParams


class Engine:
    """An LLM; facts: the environment of the measurement and the bytes that a decoded token reads."""

    def __init__(
        self,
        model: str,
        weight_format: str,
        threads: int,
        max_context: int,
        max_batch: int,
        kv_gib: float,
        shown_command: list[str],
        decode_shape: tuple[int, int],
    ) -> None:
        self._llm = LLM(
            model,
            tiers=[0],
            dtype="bfloat16",
            weights="auto" if weight_format == "bf16" else weight_format,
            device="cpu",
            kernels="auto",
            num_threads=threads,
            max_model_len=max_context,
            max_num_seqs=max_batch,
            max_num_batched_tokens=max(2048, max_context),
            kv_cache_memory=kv_gib,
            enable_prefix_caching=False,
        )
        engine = self._llm.engine
        prompt_tokens, output_tokens = decode_shape
        bytes_read = decode_bytes(DepthCost.of(engine, 0), 1, prompt_tokens, output_tokens)
        environment = describe_environment(engine, shown_command)
        self.facts: dict[str, Any] = {
            "version": environment["sleb"],
            "model": engine.model_name,
            "weights": weight_format,
            "dtype": environment["dtype"],
            "kernels": engine.runner.description,
            "settings": {"prefix_caching": False, "tiers": [0], "kv_cache_gib": kv_gib},
            "decode_bytes_per_token": bytes_read / (output_tokens - 1),
            "environment": environment,
        }

    def run(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Seconds to answer `prompts`, each with max_tokens tokens, and those of the first answer."""
        # Greedy, and nothing of the model's generation config, whose penalties would cost time of their own.
        params = SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=True,
            temperature=0.0,
            top_p=1.0,
            top_k=0,
            repetition_penalty=1.0,
        )
        started = time.perf_counter()
        outputs = self._llm.generate(prompts, params, 0)
        seconds = time.perf_counter() - started
        answers = [output.token_ids for output in outputs]
        return {"seconds": seconds, "num_tokens": sum(map(len, answers)), "token_ids": list(answers[0])}
