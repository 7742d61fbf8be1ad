"""transformers' own generate(), eager, with PyTorch's attention."""

from __future__ import annotations

import time
from typing import Any


class Engine:
    """A model of transformers. It has no limit to its cache, so max_context, max_batch and kv_gib are not used."""

    def __init__(self, model: str, threads: int, max_context: int, max_batch: int, kv_gib: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self._model = loaded.eval()
        # None of the model's own: a penalty would cost time that other engines do not spend, and without the token
        # that ends a sequence none ends early.
        self._model.generation_config = transformers.GenerationConfig()
        self.facts: dict[str, Any] = {
            "version": transformers.__version__,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "attention": self._model.config._attn_implementation,
            "compiled": False,
            "threads": torch.get_num_threads(),
            "settings": {"torch": torch.__version__},
        }

    def run(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Seconds to answer `prompts`, of equal length, with max_tokens tokens, and those of the first answer."""
        import torch

        started = time.perf_counter()
        inputs = torch.tensor(prompts)
        outputs = self._model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            pad_token_id=0,
        )
        seconds = time.perf_counter() - started
        answers = outputs[:, inputs.shape[1] :]
        return {"seconds": seconds, "num_tokens": answers.numel(), "token_ids": answers[0].tolist()}
