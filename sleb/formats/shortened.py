"""A checkpoint of any architecture of transformers with fewer blocks: its configuration, and its tensors' numbers.

What a block is may depend on its number, in ways that each architecture has its own fields for: lists with a value for
each block, lists of blocks' numbers, how many blocks at the beginning are of a kind, or a period. All are written anew
for the blocks that are kept, and checked: the model that transformers builds from the new configuration must have the
same blocks as the model that it builds from the old one, modules, shapes and settings. What a field cannot express is
refused with its name.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sleb.errors import ConfigError, ModelError
from sleb.fields import shown_path
from sleb.formats.model_config import NOT_PER_BLOCK, cut_lists, full_config
from sleb.layer_map.fingerprint import FIELDS
from sleb.models.config import read_config
from sleb.models.resolve import resolve_config
from sleb.pruning.transformers_scorer import decoder_layers, error_line, quiet, read_architecture

logger = logging.getLogger("sleb.formats")

# Lists of blocks' numbers, such as mlp_only_layers, full_attn_idxs, attn_layer_indices.
_NUMBERS = re.compile(r"(?:_layers|layer_ids|_idxs?|_indices)$")
# How many blocks at the beginning are of a kind.
_COUNTS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
# Kinds of blocks that are repeated, from which transformers cuts as many as there are blocks.
_REPEATED = ("block_types",)
# Fields that say by a block's number what it is.
_DERIVING = re.compile(r"period|offset|interval|step$|freq|every|pattern|block_types|attention_types")
_NUMBERING = re.compile(r"(?:layer|block)_?(?:idx|id|index|number)$|^idx$|init")  # settings that may differ
_MAX_PERIOD = 256


def shortened(
    path: Path, raw: Mapping[str, Any], names: Sequence[str], kept_blocks: Sequence[int]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The config.json of the model in `path` with only these blocks, and the new names of the tensors that stay.

    raw: its config.json. names: of its tensors. Raises ConfigError for what the configuration cannot express,
    ModelError for a model that transformers does not know, or whose blocks cannot be told.
    """
    config = read_architecture(path)
    new, where = _checked_config(path, raw, config, kept_blocks)
    return new, _renamed(path, names, where.rpartition(".")[2], config.num_hidden_layers, kept_blocks)


def doubt(model: str) -> str | None:
    """What to say, before a search, of a model whose configuration cannot express that its middle block is gone.

    Raises ModelError.
    """
    path = resolve_config(model).path
    config = read_architecture(path)
    blocks, middle = range(config.num_hidden_layers), config.num_hidden_layers // 2
    try:
        _checked_config(path, read_config(path).values, config, [each for each in blocks if each != middle])
    except ConfigError as error:
        return f"not every depth can be exported, so check one before you rely on it: {error}"
    return None


@quiet()
def _checked_config(
    path: Path, raw: Mapping[str, Any], config: Any, kept_blocks: Sequence[int]
) -> tuple[dict[str, Any], str]:
    """The new config.json, and the name of the list of blocks."""
    if "quantization_config" in raw:
        raise ConfigError(
            f"{shown_path(path)} is quantised, and its architecture is none of the engine's: export the checkpoint "
            "that it was made from, and quantise the result"
        )
    whole = _skeleton(config)
    where, layers = decoder_layers(whole)
    new = _shortened_config(full_config(raw, type(whole).__name__), config, kept_blocks)
    try:
        changed = _reread(new)
        _, fewer = decoder_layers(_skeleton(changed))
    except Exception as error:  # whatever the class finds wrong with it
        raise _cannot(config, kept_blocks, f"transformers refuses it ({error_line(error)})") from None
    for name, wanted in _cut_lists_of(config, kept_blocks).items():
        if (found := getattr(changed, name, None)) != wanted:
            raise _cannot(config, kept_blocks, f"{name} would be {found}, not {wanted}")
    for number, block in enumerate(kept_blocks):
        if difference := _difference(layers[block], fewer[number]):
            raise _cannot(config, kept_blocks, f"of block {block}, then block {number}, {difference}")
    return new, where


def _shortened_config(raw: Mapping[str, Any], config: Any, kept_blocks: Sequence[int]) -> dict[str, Any]:
    """Everything that is known to depend on a block's number, for the kept blocks."""
    num_blocks, number = config.num_hidden_layers, {block: at for at, block in enumerate(kept_blocks)}
    found = config.to_dict()
    # What the class fills in from a period is stated, as far as it takes a list.
    stated = {
        name: each
        for name, each in found.items()
        if name not in raw and isinstance(each, list) and (len(each) == num_blocks or _NUMBERS.search(name))
    }
    new: dict[str, Any] = {**raw, **stated}
    if {"decoder_sparse_step", "mlp_only_layers"} <= {*found, *new}:
        step, dense = found.get("decoder_sparse_step", 1), found.get("mlp_only_layers") or []
        new["mlp_only_layers"] = [
            each for each in range(num_blocks) if each in dense or step <= 0 or (each + 1) % step
        ]
        new["decoder_sparse_step"] = 1
    for name in _REPEATED:
        if isinstance(each := new.get(name), list) and each:
            new[name] = [each[block % len(each)] for block in range(num_blocks)]
    numbers: dict[str, Any] = {}
    for name, each in new.items():
        if _NUMBERS.search(name) and _is_numbers(each, num_blocks):
            numbers[name] = [number[block] for block in each if block in number]
        elif isinstance(each, str) and "pattern" in name and len(each) == num_blocks:
            numbers[name] = "".join(each[block] for block in kept_blocks)
    new = {**cut_lists(new, num_blocks, kept_blocks), **numbers}
    for name in _COUNTS:
        if isinstance(count := found.get(name), int):
            new[name] = sum(block < count for block in kept_blocks)
    scale = found.get("scale_depth")
    if isinstance(scale, int | float):  # MiniCPM divides it by the root of the number of blocks
        new["scale_depth"] = scale * math.sqrt(len(kept_blocks) / num_blocks)
    named = [name for name in FIELDS["num_blocks"] if name in raw] or ["num_hidden_layers"]
    return {**new, **dict.fromkeys(named, len(kept_blocks)), **_periods(config, kept_blocks)}


def _is_numbers(value: Any, num_blocks: int) -> bool:
    """Whether a list holds blocks' numbers, not a value for each block: 0 and 1 for no and yes."""
    is_list = isinstance(value, list) and all(type(each) is int and 0 <= each < num_blocks for each in value)
    return is_list and len(set(value)) == len(value)


def _periods(config: Any, kept_blocks: Sequence[int]) -> dict[str, int]:
    """Of each pair of fields x_period and x_offset the values by which most lists that follow from them are right."""
    pairs = [name for name in config.to_dict() if name.endswith("_period")]
    if not pairs or len(kept_blocks) > _MAX_PERIOD:
        return {}
    wanted, changed = _cut_lists_of(config, kept_blocks), copy.deepcopy(config)
    changed.num_hidden_layers = len(kept_blocks)
    found: dict[str, int] = {}
    for period in pairs:
        offset = period.removesuffix("period") + "offset"

        def fitting(values: tuple[int, int], names: tuple[str, str] = (period, offset)) -> int:
            for name, value in zip(names, values, strict=True):
                setattr(changed, name, value)
            return sum(getattr(changed, name) == each for name, each in wanted.items())

        present = (getattr(config, period), getattr(config, offset, 0))
        longest = len(kept_blocks) + 1
        every = [present, *((one, two) for one in range(1, longest + 1) for two in range(one))]
        best = max(every, key=fitting)
        fitting(best)
        found |= dict(zip((period, offset), best, strict=True))
    return found


def _cut_lists_of(config: Any, kept_blocks: Sequence[int]) -> dict[str, list[Any]]:
    """The lists with a value for each block that a configuration has, or derives, cut to the kept blocks."""
    names = {
        *vars(config),
        *(name for name in dir(type(config)) if isinstance(getattr(type(config), name), property)),
    }
    lists: dict[str, list[Any]] = {}
    for name in sorted(names):
        value = getattr(config, name, None)
        if isinstance(value, list) and len(value) == config.num_hidden_layers and name not in NOT_PER_BLOCK:
            numbers = _NUMBERS.search(name) and _is_numbers(value, len(value))
            if not numbers:
                lists[name] = [value[block] for block in kept_blocks]
    return lists


def _reread(values: Mapping[str, Any]) -> Any:
    """transformers' configuration of a config.json, as it would read it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        return read_architecture(Path(folder))


def _cannot(config: Any, kept_blocks: Sequence[int], why: str) -> ConfigError:
    raw = config.to_dict()
    fields = [
        name for name, each in raw.items() if _DERIVING.search(name) and isinstance(each, int | list | str)
    ]
    removed = [block for block in range(config.num_hidden_layers) if block not in kept_blocks]
    by = f"; it says by {', '.join(fields)} what each block is" if fields else ""
    return ConfigError(
        f"a config.json of {config.model_type} cannot express the model without blocks "
        f"{', '.join(map(str, removed))}: {why}{by}. Choose another depth"
    )


def _skeleton(config: Any) -> Any:
    """The model without numbers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _difference(one: nn.Module, other: nn.Module) -> str | None:
    """Where two blocks differ in modules, shapes or settings; None: nowhere."""
    first, second = _traits(one), _traits(other)
    for name in {**first, **second}:
        before, now = first.get(name), second.get(name)
        close = (
            isinstance(before, float) and isinstance(now, float) and math.isclose(before, now, rel_tol=1e-9)
        )
        if before != now and not close:
            return f"{name} would be {now}, not {before}"
    return None


def _traits(layer: nn.Module) -> dict[str, Any]:
    traits: dict[str, Any] = {}
    for path, module in layer.named_modules():
        traits[f"{path or 'block'}"] = type(module).__name__
        for name, value in vars(module).items():
            plain = value is None or isinstance(value, bool | int | float | str)
            if plain and not name.startswith("_") and not _NUMBERING.search(name):
                traits[f"{path}.{name}".strip(".")] = value
    return traits | {name: tuple(each.shape) for name, each in layer.named_parameters()}


def _renamed(
    path: Path, names: Sequence[str], list_name: str, num_blocks: int, kept_blocks: Sequence[int]
) -> dict[str, str]:
    """New names by old ones. Raises ModelError unless one list of the checkpoint has all blocks."""
    pattern = re.compile(rf"((?:[^.]+\.)*?{re.escape(list_name)})\.(\d{{1,9}})\.(.+)")
    places = {name: found.groups() for name in names if (found := pattern.fullmatch(name))}
    blocks: dict[str, set[int]] = {}
    for prefix, block, _ in places.values():
        blocks.setdefault(prefix, set()).add(int(block))
    whole = [prefix for prefix, numbers in blocks.items() if numbers >= set(range(num_blocks))]
    if len(whole) != 1:
        raise ModelError(
            f"{shown_path(path)} holds {len(whole)} lists of {num_blocks} blocks: which tensors are whose is not known"
        )
    number = {block: at for at, block in enumerate(kept_blocks)}
    renamed, further = {}, []
    for name in names:
        prefix, text, rest = places.get(name, (None, "0", ""))
        block = int(text)
        if prefix != whole[0]:
            renamed[name] = name
        elif block in number:
            renamed[name] = f"{prefix}.{number[block]}.{rest}"
        elif block >= num_blocks:
            further.append(name)
    if further:
        logger.warning(
            "%s: %d tensors behind the last block, such as %s, are left out: they predict from the whole model",
            shown_path(path), len(further), further[0],
        )  # fmt: skip
    return renamed
