"""What lm_eval.py wrote, against transformers on the same weights in float32: lm_eval_reference.py FILE FOLDER MAP.

FOLDER has the model, MAP says which blocks each depth lacks and what stands in their place. Imports neither sleb nor
lm-eval, whose rules for contexts and windows are written out here.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-3


class Patch(torch.nn.Module):
    """What stands where a run of blocks was: h + W h / rms(h) + b."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight, self.bias, self.epsilon = weight.float(), bias.float(), epsilon

    def forward(self, hidden: torch.Tensor, **_: Any) -> torch.Tensor:
        mean = hidden.square().mean(-1, keepdim=True)
        return hidden + hidden * (mean + self.epsilon).rsqrt() @ self.weight.T + self.bias


def read_patches(file: Path, depth: int, epsilon: float) -> dict[int, Patch]:
    """The patches of a depth by the first block that each replaces."""
    found = {}
    with safe_open(file, "pt") as tensors:
        for number, told in enumerate(json.loads(tensors.metadata()["patches"])):
            if told["first_depth"] <= depth <= (told["last_depth"] or depth):
                assert (told["form"], told["normed"]) == ("full", True)
                values = (tensors.get_tensor(f"{number}.{name}") for name in ("weight", "bias"))
                found[int(told["first"].split(".")[0])] = Patch(*values, epsilon)
    return found


class Reference:
    """A model at one depth; `layers` are all of its blocks, `patches` what stands where some are removed."""

    def __init__(
        self, model: Any, tokenizer: Any, layers: list[Any], removed: list[int], patches: dict[int, Patch]
    ) -> None:
        kept = [
            patches.get(block, layer)
            for block, layer in enumerate(layers)
            if block in patches or block not in removed
        ]
        for number, layer in enumerate(kept):
            if not isinstance(layer, Patch):
                layer.self_attn.layer_idx = number  # its place in the cache
        model.model.layers = torch.nn.ModuleList(kept)
        model.config.num_hidden_layers = len(kept)
        self.model, self.tokenizer = model, tokenizer
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.prefix: int = end if begin is None else begin
        self.score = cache(self._score)
        self.generate = cache(self._generate)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _score(self, context: tuple[int, ...], continuation: tuple[int, ...]) -> tuple[float, bool]:
        """Log-probability of `continuation`, and whether each of its tokens is the most probable one."""
        ids = torch.tensor([context + continuation])
        wanted = ids[0, len(context) :]
        with torch.inference_mode():
            logits = self.model(ids[:, :-1]).logits[0, len(context) - 1 :]
        # torch's log_softmax in float32 errs by 1e-5, always to one side: over a long text that adds up.
        logprobs = logits.double().log_softmax(-1)
        total = logprobs.gather(1, wanted[:, None]).sum()
        return total.item(), bool((logprobs.argmax(-1) == wanted).all())

    def loglikelihood(self, context: str, continuation: str, max_length: int) -> tuple[float, bool]:
        if context:
            before = self.encode(context.rstrip())
            after = self.encode(context + continuation)[len(before) :]
        else:
            before, after = [self.prefix], self.encode(continuation)
        # lm-eval leaves room for the one token that has to be generated.
        before = before[-(max_length - 1 - len(after)) :]
        return self.score(tuple(before), tuple(after))

    def rolling(self, text: str, max_length: int) -> float:
        """Log-probability of a text in windows: one begins with the prefix, the last with what it has room for."""
        ids, window, total = [self.prefix, *self.encode(text)], max_length - 2, 0.0
        for start in range(1, len(ids), window):
            end = min(start + window, len(ids))
            begin = max(0, end - window - 1)
            total += self.score(tuple(ids[begin:start]), tuple(ids[start:end]))[0]
        return total

    def _generate(self, prompt: str, limit: int) -> str:
        ids = torch.tensor([self.encode(prompt)])
        answer = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit
        )
        text: str = self.tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
        return text

    def greedy(self, prompt: str | list[str], options: dict[str, Any]) -> str:
        if isinstance(prompt, list):  # messages, as JSON: the server applies the template
            prompt = self.tokenizer.apply_chat_template(
                json.loads(prompt[0]), tokenize=False, add_generation_prompt=True
            )
        text = self.generate(prompt, options["max_gen_toks"])
        for stop in options["until"]:
            text = text.split(stop)[0]
        return text


def compare(record: dict[str, Any], reference: Reference) -> dict[str, list[float]]:
    """The absolute differences in each kind of answer; 0 or infinite for what is no number."""
    found: dict[str, list[float]] = defaultdict(list)
    length = record["max_length"]
    for task, samples in record["tasks"].items():
        for sample in samples:
            request, answer = sample["request"], sample["answer"]
            if isinstance(answer, str):
                found["greedy text"].append(0.0 if answer == reference.greedy(*request) else math.inf)
            elif isinstance(answer, list):
                context, continuation = request
                score, is_greedy = reference.loglikelihood(context, continuation, length)
                kind = "choice" if "choices" in task else "log-likelihood"
                found[kind].append(abs(score - answer[0]))
                found["is greedy"].append(0.0 if answer[1] == is_greedy else math.inf)
            else:
                found["rolling"].append(abs(reference.rolling(request[0], length) - answer))
    return found


def main() -> None:
    torch.set_num_threads(1)  # more gain little in a small model, and wait for each other on a busy machine
    records = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder, map_file = sys.argv[2], Path(sys.argv[3])
    layer_map = json.loads(map_file.read_text(encoding="utf-8"))
    order, patch_file = layer_map["removed"], map_file.parent / layer_map["patches"]["file"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = list(model.model.layers)
    failed = False
    for depth in sorted({record["depth"] for record in records}):
        patches = read_patches(patch_file, depth, model.config.rms_norm_eps)
        reference = Reference(model, tokenizer, layers, order[:depth], patches)
        for record in (each for each in records if each["depth"] == depth):
            for kind, differences in compare(record, reference).items():
                worst = max(differences)
                failed |= not worst < TOLERANCE
                print(
                    f"{record['model']:<16}{record['run']:<28}{kind:<16}{len(differences):>4}"
                    f"{worst:>12.2e}{'' if worst < TOLERANCE else '  DIFFERS'}"
                )
    assert not failed
    print("lm-eval agrees with transformers")


main()
