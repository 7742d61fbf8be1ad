"""A model of any architecture that transformers has, over dense windows of tokens, by transformers' own modules.

The search runs the decoder layers one by one. What the model passes to them beside the hidden states (masks, position
embeddings) is caught in one forward pass for each shape of windows. What is around the layers (embedding, final norm,
head, scales, caps) is the model's own forward pass, in which the layers hand on what they are given. Code that lies
beside a checkpoint is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sleb.engine.memory import check_fits, refusal_told
from sleb.engine.model.resolve import resolve_device
from sleb.engine.text import TextProcessor
from sleb.errors import ModelError, SlebError
from sleb.fields import shown_path, shown_text
from sleb.layer_map.patches import Patch
from sleb.layer_map.units import MAX_BLOCKS, Unit
from sleb.models.config import MAX_VOCABULARY, model_fingerprint, read_config
from sleb.models.resolve import resolve_model
from sleb.models.weight_files import stored_tensors

RUNTIME = "transformers"
_LOGIT_BYTES = 1 << 28  # of logits in float32 that are there at once
_SHAPES = 4  # of windows whose calls are kept: masks may be large
_CHECKED_TOKENS = 24
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # of the largest logit

Forward = Callable[..., Any]


@dataclass(frozen=True)
class _Call:
    """How the model calls a layer with windows of one shape, and what it takes back.

    Attributes:
        args, kwargs: everything but the hidden states, which are first, or `hidden_states`.
        rest: what the layer returns behind the hidden states; None: it returns them alone.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rest: tuple[Any, ...] | None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> _Call:
        others = {name: value for name, value in kwargs.items() if args or name != "hidden_states"}
        return cls(args[1:], others, output[1:] if isinstance(output, tuple) else None)

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        output = layer(hidden, *self.args, **self.kwargs)
        result: Tensor = output if self.rest is None else output[0]
        return result

    def output(self, hidden: Tensor) -> Any:
        return hidden if self.rest is None else (hidden, *self.rest)

    def hand_on(self, *args: Any, **kwargs: Any) -> Any:
        """As a layer's forward pass: what it is given."""
        return self.output(_hidden(args, kwargs))


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


class _FarEnoughError(Exception):
    """The forward pass has got as far as it needs to."""


class TransformersScorer:
    """`sleb.pruning.search.ScoringModel` over a model of transformers. W windows of L tokens, hidden size H.

    Differentiable with respect to hidden states as far as the layers are; callers that need no gradient say
    torch.no_grad().

    Attributes:
        num_blocks, max_length: of the model; max_length is its longest window in tokens, None where it has no limit.
        fingerprint, model_name: for the layer map. tokenizer: a `tokenizers.Tokenizer`, or None; text: what knows it.
    """

    def __init__(self, model: Any, model_name: str, fingerprint: str | None, text: TextProcessor) -> None:
        """Raises ModelError for a model whose layers cannot be run one by one."""
        self._model, self.model_name, self.fingerprint = model, model_name, fingerprint
        _, self._layers = decoder_layers(model)
        self.num_blocks = len(self._layers)
        self.max_length: int | None = getattr(model.config, "max_position_embeddings", None)
        self.vocab_size = int(model.config.vocab_size)
        self.text, self.tokenizer = text, text.tokenizer
        self._calls: dict[tuple[int, ...], list[_Call]] = {}
        with quiet():
            self._check_walk()

    @classmethod
    def load(
        cls,
        model: str,
        dtype: str = "float32",
        device: str = "auto",
        check: Callable[[int], object] = lambda num_blocks: None,
    ) -> TransformersScorer:
        """The scorer of MODEL (folder or hub id).

        check: called with the number of blocks before the weights are loaded. Raises ModelError or ConfigError.
        """
        target, resolved = resolve_device(device), resolve_model(model)
        config = read_architecture(resolved.path)
        check(config.num_hidden_layers)
        loaded = load_model(resolved.path, config, getattr(torch, dtype), target)
        fingerprint = model_fingerprint(read_config(resolved.path))
        return cls(loaded, resolved.name, fingerprint, TextProcessor(resolved.path, config.vocab_size))

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [W, L] int64 to hidden states [W, L, H]."""
        found: list[Tensor] = []

        def stop(*args: Any, **kwargs: Any) -> NoReturn:
            found.append(_hidden(args, kwargs))
            raise _FarEnoughError

        with self._forwards([stop] * self.num_blocks):
            self._forward(token_ids)
        return found[0]

    def run(self, unit: Unit, hidden: Tensor) -> Tensor:
        """Hidden states [W, L, H] after a block, as a new tensor."""
        assert unit.part == "block"
        call = self._caught(hidden.shape[:2])[unit.block]
        return call.run(self._layers[unit.block], hidden.clone())  # some layers write over their input

    def apply(self, patch: Patch, hidden: Tensor) -> Tensor:
        """No patch is fitted to such a model: nothing that is made of it could hold one."""
        raise NotImplementedError

    def normed(self, hidden: Tensor) -> Tensor:
        """As `apply`."""
        raise NotImplementedError

    def token_losses(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Cross-entropy [W, L − 1] float32 in nats of each token given those before it."""
        targets = token_ids[:, 1:].to(hidden.device)

        def losses(states: Tensor, wanted: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self._logits(states), wanted, reduction="none")

        return self._by_rows(losses, hidden[:, :-1], targets)[0]

    def expected_rows(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states themselves: what follows them is not known to be linear."""
        return hidden[:, :-1].clone(), hidden.new_zeros(hidden.shape[0], hidden.shape[1] - 1)

    def divergences(
        self, hidden: Tensor, token_ids: Tensor, expected: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """KL(p ‖ q) [W, L − 1] float32 in nats from the distributions p of `expected_rows`, and `token_losses`."""
        targets = token_ids[:, 1:].to(hidden.device)

        def values(states: Tensor, wanted: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
            ours, theirs = (self._logits(each).log_softmax(-1) for each in (states, dense))
            divergence = (theirs.exp() * (theirs - ours)).sum(-1).clamp_min(0)
            return divergence, -ours.gather(1, wanted[:, None])[:, 0]

        found = self._by_rows(values, hidden[:, :-1], targets, expected[0])
        return found[0], found[1]

    def num_parameters(self, unit: Unit) -> int:
        """How many weights a block has."""
        return sum(each.numel() for each in self._layers[unit.block].parameters())

    def _by_rows(self, values: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
        """`values` of a few tokens of the inputs [W, L, …] at a time: tensors [W, L]."""
        shape = inputs[0].shape[:2]
        size = max(1, min(shape[1], _LOGIT_BYTES // (4 * self.vocab_size)))
        parts = []
        for rows in zip(*(each.flatten(0, 1).split(size) for each in inputs), strict=True):
            # Logits of all tokens would be kept for the way back: they are computed again instead.
            again = torch.is_grad_enabled() and rows[0].requires_grad
            found = checkpoint(values, *rows, use_reentrant=False) if again else values(*rows)
            parts.append(found if isinstance(found, tuple) else (found,))
        return [torch.cat(part).view(shape) for part in zip(*parts, strict=True)]

    def _logits(self, states: Tensor) -> Tensor:
        """Of hidden states [T, H] at the end: [T, V] float32, by a forward pass whose layers hand these on."""
        calls = next(reversed(self._calls.values()))
        forwards: list[Forward] = [call.hand_on for call in calls]
        forwards[-1] = lambda *args, **kwargs: calls[-1].output(states[None])
        with self._forwards(forwards):
            output = self._forward(torch.zeros(1, len(states), dtype=torch.int64))
        logits: Tensor = output.logits[0].float()
        return logits

    def _caught(self, shape: Sequence[int]) -> list[_Call]:
        """How each layer is called with windows of a shape [W, L]."""
        key = tuple(shape)
        if key in self._calls:
            self._calls[key] = self._calls.pop(key)  # the last one used is kept longest
            return self._calls[key]
        calls: list[_Call] = []

        def watched(index: int, forward: Forward) -> Forward:
            def call(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                if len(calls) != index:
                    self._refuse(f"runs block {index} as the {len(calls) + 1}th")
                calls.append(_Call.of(args, kwargs, output))
                if index == self.num_blocks - 1:
                    raise _FarEnoughError
                return output

            return call

        with torch.no_grad(), self._forwards([watched(*each) for each in enumerate(self._own_forwards())]):
            self._forward(torch.zeros(key, dtype=torch.int64))
        if len(calls) != self.num_blocks:
            self._refuse(f"runs {len(calls)} of its {self.num_blocks} blocks")
        self._calls[key] = calls
        while len(self._calls) > _SHAPES:
            del self._calls[next(iter(self._calls))]
        return calls

    def _own_forwards(self) -> list[Forward]:
        return [layer.forward for layer in self._layers]

    @contextmanager
    def _forwards(self, forwards: Sequence[Forward]) -> Iterator[None]:
        """Within, the layers do this instead of their own."""
        for layer, forward in zip(self._layers, forwards, strict=True):
            layer.__dict__["forward"] = forward
        try:
            yield
        except _FarEnoughError:
            pass
        finally:
            for layer in self._layers:
                del layer.__dict__["forward"]

    def _forward(self, token_ids: Tensor) -> Any:
        return self._model(input_ids=token_ids.to(self._model.device), use_cache=False)

    @torch.no_grad()
    def _check_walk(self) -> None:
        """Block by block the model must compute what it computes as a whole: with all blocks, and with one passed over.

        Raises ModelError where it does not.
        """
        generator = torch.Generator().manual_seed(0)
        length = min(_CHECKED_TOKENS, self.max_length or _CHECKED_TOKENS)
        tokens = torch.randint(self.vocab_size, (2, length), generator=generator)
        try:
            calls = self._caught(tokens.shape)
            for missing in (None, self.num_blocks // 2):
                forwards = self._own_forwards()
                if missing is not None:
                    forwards[missing] = calls[missing].hand_on
                with self._forwards(forwards):
                    whole = self._forward(tokens).logits.float()
                hidden = self.embed(tokens)
                for block in range(self.num_blocks):
                    hidden = hidden if block == missing else self.run(Unit(block), hidden)
                walked = self._logits(hidden.flatten(0, 1)).view(whole.shape)
                difference = float((walked - whole).abs().max() / whole.abs().max().clamp_min(1e-6))
                if not difference <= _TOLERANCE.get(hidden.dtype, 1e-4):
                    what = "" if missing is None else f" without block {missing}"
                    self._refuse(
                        f"computes other logits block by block than as a whole{what}: they differ by {difference:.2g} "
                        "of the largest"
                    )
        except SlebError:
            raise
        except Exception as error:
            self._refuse(f"fails when its blocks are run one by one ({error_line(error)})")

    def _refuse(self, why: str) -> NoReturn:
        raise ModelError(
            f"{shown_path(self.model_name)}: {type(self._model).__name__} {why}, so the search cannot leave blocks out "
            "of it"
        )


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of a model's blocks and its name: the only one of num_hidden_layers modules; they share no weights.

    Raises ModelError for a model that has none, or several.
    """
    name, num_blocks = type(model).__name__, int(model.config.num_hidden_layers)
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks and not inside:
            found[path] = module
    if len(found) != 1:
        which = f"{len(found)} lists ({', '.join(found)})" if found else "no list"
        raise ModelError(
            f"{name} has {which} of num_hidden_layers = {num_blocks} modules: its blocks are not known"
        )
    [(path, layers)] = found.items()
    owner: dict[int, int] = {}
    for block, layer in enumerate(layers):
        for parameter in layer.parameters():
            if owner.setdefault(id(parameter), block) != block:
                raise ModelError(
                    f"blocks {owner[id(parameter)]} and {block} of {name} share weights, so neither can be left out "
                    "alone"
                )
    return path, layers


def read_architecture(path: Path) -> Any:
    """transformers' configuration of the model in a folder, for which it has a class of its own. Raises ModelError."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    with quiet():
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        except Exception as error:
            raise ModelError(
                f"{shown_path(path)}: transformers has no configuration of its own for it ({error_line(error)}); code "
                "that lies beside a checkpoint is never run"
            ) from None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{shown_path(path)}: model_type {config.model_type} is none of transformers' models of text alone"
        )
    fields = {"num_hidden_layers": MAX_BLOCKS, "vocab_size": MAX_VOCABULARY}
    for field, most in fields.items():
        value = getattr(config, field, None)
        if not isinstance(value, int) or not 1 <= value <= most:
            raise ModelError(
                f"{shown_path(path)}/config.json: {field} is {value!r}; it must be a number from 1 to {most}"
            )
    return config


def load_model(path: Path, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a folder, whole: none of its weights may be missing. Raises ModelError."""
    from transformers import AutoModelForCausalLM

    stored = stored_tensors(path).values()
    size = sum(torch.Size(each.shape).numel() for each in stored) * dtype.itemsize
    remedy = "take --dtype bfloat16" if dtype == torch.float32 else "take a machine with more"
    check_fits("the weights take", size, device, remedy, ModelError)
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    with quiet(), refusal_told("the weights", device, remedy):
        try:
            model, info = load(
                path,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:
            raise ModelError(
                f"{shown_path(path)}: transformers cannot load it ({error_line(error)})"
            ) from None
    if lacking := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise ModelError(
            f"{shown_path(path)} lacks {shown_text(lacking[0])}, or has it in another shape ({len(lacking)} such "
            "tensors): the checkpoint is not whole"
        )
    return model.eval().requires_grad_(False).to(device)


def error_line(error: BaseException) -> str:
    """The first line of an error of transformers."""
    lines = str(error).strip().splitlines()
    return shown_text(f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300])


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own remarks and bars."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
