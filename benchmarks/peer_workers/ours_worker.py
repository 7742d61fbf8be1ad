"""sleb, at one depth of a model or several; `serve` puts it behind its own HTTP server."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Sequence
from typing import Any

from sleb.benchmarks.environment import describe_environment
from sleb.benchmarks.ideal import DepthCost, decode_bytes
from sleb.benchmarks.throughput import greedy_params
from sleb.engine.llm import LLM


class Engine:
    """An LLM; facts: the environment of the measurement and the bytes that a decoded token reads, by depth.

    step_tokens: the most tokens of a step; None: the engine's own choice.
    """

    def __init__(
        self,
        model: str,
        layer_map: str | None,
        depths: Sequence[int],
        weight_format: str,
        threads: int,
        max_context: int,
        max_batch: int,
        kv_gib: float,
        step_tokens: int | None,
        shown_command: Sequence[str],
        decode_shape: tuple[int, int],
    ) -> None:
        self._max_batch = max_batch
        self._llm = LLM(
            model,
            layer_map,
            tiers=list(depths),
            dtype="bfloat16",
            weights="auto" if weight_format == "bf16" else weight_format,
            device="cpu",
            kernels="auto",
            threads=threads,
            max_model_len=max_context,
            max_num_seqs=max_batch,
            max_num_batched_tokens=step_tokens,
            kv_cache_memory=kv_gib,
            prefix_caching=False,
        )
        engine = self._llm.engine
        environment = describe_environment(engine, shown_command)
        compiled = environment["kernels"] == "cpu"
        self.facts: dict[str, Any] = {
            "version": environment["sleb"],
            "model": engine.model_name,
            "weights": weight_format,
            "dtype": environment["dtype"],
            "attention": "paged",
            "compiled": "C" if compiled else False,
            "threads": engine.runner.executor.num_threads,
            "kernels": engine.runner.description,
            "settings": {"prefix_caching": False, "tiers": list(depths), "kv_cache_gib": kv_gib},
            "decode_bytes_per_token": {
                str(depth): self._decode_bytes(depth, *decode_shape) for depth in depths
            },
            "environment": environment,
        }

    def _decode_bytes(self, depth: int, prompt_tokens: int, output_tokens: int) -> float:
        """Bytes that one stream's token reads."""
        cost = DepthCost.of(self._llm.engine, depth)
        return decode_bytes(cost, 1, prompt_tokens, output_tokens) / (output_tokens - 1)

    def run(self, prompts: list[list[int]], max_tokens: int, depth: int) -> dict[str, Any]:
        """Seconds to answer `prompts`, each with max_tokens tokens, and those of the first answer."""
        params = greedy_params(max_tokens)
        started = time.perf_counter()
        outputs = self._llm.generate(prompts, params, depth)
        seconds = time.perf_counter() - started
        answers = [output.token_ids for output in outputs]
        return {"seconds": seconds, "num_tokens": sum(map(len, answers)), "token_ids": list(answers[0])}

    def serve(self) -> dict[str, Any]:
        """Starts the server of `sleb serve` on a free port of this machine; models: the id of each depth."""
        from sleb.server.context import ServerContext
        from sleb.server.options import ServeOptions
        from sleb.server.run import base_url, bind_socket, make_server

        engine = self._llm.engine
        context = ServerContext.create(engine, ServeOptions(port=0, warm_up=False), self._max_batch)
        sock = bind_socket("127.0.0.1", 0)
        gc.collect()
        gc.freeze()
        server = make_server(context)
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server ended before it could be reached")
            time.sleep(0.01)
        return {"url": base_url(sock), "models": {str(tier.depth): tier.id for tier in engine.tiers}}
