"""A folder's tensors held against a model: each under its family's name for it, in its shape, as numbers.

Reads headers only, but for an output head that is stored beside an embedding to which the config ties it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sleb.engine.model.allocation import all_sublayers, allocate
from sleb.engine.model.architecture import DecoderSpec
from sleb.engine.model.quantized.find import (
    QuantizedTensor,
    check_not_quantized,
    quantized_by_config,
    quantized_tensors,
)
from sleb.errors import ModelError
from sleb.fields import shown_path, shown_text
from sleb.models.weight_files import StoredTensor, opened, stored_tensors

logger = logging.getLogger("sleb.engine")

# What a model of these families computes itself or does not use: rotary buffers and masks, scales of an eight-bit
# KV cache, positions, heads of a reward model, eyes.
_HARMLESS = re.compile(
    r"(?:.*\.)?(?:rotary_emb\..*|inv_freq|cos_cached|sin_cached|(?:attn|attention)\.bias|masked_bias|position_ids"
    r"|(?:vision_tower|multi_modal_projector)\..*"
    r"|[qkv]_scale|kv_scale|prob_scale|(?:[qkv]_proj|attn)\.output_scale|(?:v_head|value_head|score)\..*)"
)
_EYES = re.compile(r"(?:^|\.)(?:vision_tower|multi_modal_projector)\.")
_COMPARED_BYTES = 1 << 26  # of two matrices at once


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a folder.

    Attributes:
        spec: the model's, with tied_embeddings as the tensors have it.
        tensors: exactly those that `spec` asks for, by its names, in its shapes; a quantised matrix is one.
        extras: others that do no harm, by the names that they would have; those of eyes are left out.
    """

    spec: DecoderSpec
    tensors: Mapping[str, StoredTensor]
    extras: Mapping[str, StoredTensor]

    @property
    def quantized(self) -> dict[str, QuantizedTensor]:
        """Those of `tensors` that are stored quantised."""
        return {name: each for name, each in self.tensors.items() if isinstance(each, QuantizedTensor)}


def open_checkpoint(path: Path, spec: DecoderSpec) -> Checkpoint:
    """The checkpoint in the folder `path`, checked against `spec`.

    Tied embeddings: embedding or head may be missing; a head of other values is used, as in transformers. Raises
    ModelError for weights that are quantised in a way that is not read, and for missing, extra or misshaped tensors.
    """
    stored = quantized_tensors(path, stored_tensors(path))
    check_not_quantized(path, [each for each in stored.values() if not _HARMLESS.fullmatch(each.name)])
    untied = replace(spec, tied_embeddings=False)
    _, expected = allocate(untied, all_sublayers(spec), torch.float32, torch.device("meta"))
    named = _by_own_names(path, stored, spec, expected)
    spec, named, copies = _tied(spec, named)
    if spec.tied_embeddings:
        del expected[f"{spec.names.head}.weight"]
    extras = {name: tensor for name, tensor in named.items() if name not in expected}
    _check_present(path, spec, expected, named, extras)
    tensors = {name: named[name] for name in expected}
    for name, tensor in tensors.items():
        wanted = expected[name].stored_shape
        if tensor.shape != wanted:
            raise ModelError(
                f"{shown_path(tensor.file)}: {tensor.name} has shape {tensor.shape}, but the config asks for {wanted}"
            )
    if extras:
        logger.warning("%s: not used: %s", shown_path(path), _some(extras.values()))
    kept = {name: tensor for name, tensor in extras.items() if not _EYES.search(tensor.name)}
    checkpoint = Checkpoint(spec, tensors, {**kept, **copies})
    if not checkpoint.quantized and (method := quantized_by_config(path)):
        logger.warning(
            "%s: config.json names the quantisation %s, but the tensors are plain numbers and are read as those",
            shown_path(path),
            method,
        )
    return checkpoint


def _by_own_names(
    path: Path, stored: Mapping[str, StoredTensor], spec: DecoderSpec, expected: Container[str]
) -> dict[str, StoredTensor]:
    """The tensors by the family's names, whose `model.` or `decoder.` files may leave out, or have once more; and
    before which, or in whose place, those of a model that also sees have `language_model.`."""
    outer, _, blocks = spec.names.block.removesuffix(".{block}").rpartition(
        "."
    )  # "model" or "model.decoder", "layers"
    outer, parts = f"{outer}.", (*outer.split("."), "language_model")
    named: dict[str, StoredTensor] = {}
    for tensor in stored.values():
        name = bare = tensor.name
        while bare.partition(".")[0] in parts:
            bare = bare.partition(".")[2]
        if bare in expected:
            name = bare
        elif bare.startswith(f"{blocks}.") or outer + bare in expected:
            name = outer + bare
        if name in named:
            raise ModelError(
                f"{shown_path(path)} holds one tensor under two names, {shown_text(named[name].name)} and "
                f"{shown_text(tensor.name)}; leave only the files of one model in the folder"
            )
        named[name] = tensor
    return named


def _tied(
    spec: DecoderSpec, named: Mapping[str, StoredTensor]
) -> tuple[DecoderSpec, dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The spec, its tensors, and a head that is a copy of the embedding."""
    head, embed = f"{spec.names.head}.weight", f"{spec.names.embed}.weight"
    named = dict(named)
    if not spec.tied_embeddings or head not in named:
        return spec, named, {}
    if embed not in named:
        named[embed] = named.pop(head)
        return spec, named, {}
    if _equal(named[head], named[embed]):
        return spec, named, {head: named.pop(head)}
    logger.warning(
        "%s: config.json ties the output head to the embedding, but %s is stored with values of its own: it is used",
        shown_path(named[head].file),
        named[head].name,
    )
    return replace(spec, tied_embeddings=False), named, {}


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two matrices hold the same numbers; a part at a time, since they may be gigabytes."""
    if one.shape != other.shape or len(one.shape) != 2:
        return False
    if isinstance(one, QuantizedTensor) or isinstance(other, QuantizedTensor):
        return torch.equal(one.read().float(), other.read().float())
    step = max(1, _COMPARED_BYTES // (8 * max(1, one.shape[1])))
    with opened(one.file) as first, opened(other.file) as second:
        parts = first.get_slice(one.name), second.get_slice(other.name)
        for start in range(0, one.shape[0], step):
            ours, theirs = (part[start : start + step] for part in parts)
            if not torch.equal(ours, theirs.to(ours.dtype)):
                return False
    return True


def _check_present(
    path: Path,
    spec: DecoderSpec,
    expected: Iterable[str],
    named: Mapping[str, StoredTensor],
    extras: Mapping[str, StoredTensor],
) -> None:
    """Raises ModelError, which states what is there, for missing tensors and for extra ones that may do harm."""
    place, prefix = shown_path(path), spec.names.block.partition("{block}")[0]
    blocks = {
        int(found[1]) for name in named if (found := re.match(rf"{re.escape(prefix)}(\d{{1,9}})\.", name))
    }
    says = f"config.json says num_hidden_layers {spec.num_blocks}"
    if missing := sorted(name for name in expected if name not in named):
        some = _few(missing)
        if lacking := sorted(set(range(spec.num_blocks)) - blocks):
            held = f"no block {lacking[0]}, but blocks up to {max(blocks)}" if blocks else "no block at all"
            raise ModelError(f"{place} lacks {some}: {says}, and there is {held}{_instead(path, extras)}")
        if missing == [f"{spec.names.head}.weight"]:
            raise ModelError(
                f"{place} lacks {some}, and config.json does not tie it to the embedding (tie_word_embeddings)"
            )
        raise ModelError(
            f"{place} lacks {some}, which {spec.architecture} has with this config.json{_instead(path, extras)}"
        )
    if harmful := sorted(name for name, each in extras.items() if not _HARMLESS.fullmatch(each.name)):
        beyond = sorted(block for block in blocks if block >= spec.num_blocks)
        if beyond:
            raise ModelError(
                f"{place} holds {prefix}{beyond[0]} too, which makes {len(blocks)} blocks, but {says}: one of them is "
                "not this model's"
            )
        raise ModelError(
            f"{place} holds {_some(extras[name] for name in harmful)}, for which {spec.architecture} has no place with "
            "this config.json"
        )


def _instead(path: Path, extras: Mapping[str, StoredTensor]) -> str:
    """What stands in the place of missing tensors, if anything does: other names, or another form of the weights."""
    method = quantized_by_config(path)
    return (f"; stored instead: {_some(extras.values())}" if extras else "") + (
        f"; config.json names the quantisation {method}" if method else ""
    )


def _some(tensors: Iterable[StoredTensor]) -> str:
    return _few([tensor.name for tensor in tensors])


def _few(names: list[str]) -> str:
    shown = ", ".join(shown_text(name[:200]) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"
