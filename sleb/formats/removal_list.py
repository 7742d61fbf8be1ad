"""Lists of whole blocks: SLEB's removal list, its result file, and llama.cpp's flag.

SLEB (github.com/jiwonsong-dev/SLEB): `eval.py --removal_list "[14, 23, 11]"` takes block numbers of the original
model in any order; `sleb.py` finds them one by one and appends a record to a text file:

    Time Elapsed: 1234.5
    Model Name: meta-llama/Llama-2-7b-hf
    # Total Blocks: 32
    # Remove Blocks: 7
    Dataset: wikitext2
    Seed: 0
    Barriers: early 1 / latter 1
    Block Removal Order: [14, 23, 11, 24, 10, 27, 15]
    WikiText-2 PPL = 9.14
    C4 PPL = 11.21

Shortened LLaMA (arXiv 2402.02834; github.com/Nota-NetsPresso/shortened-llm, block_order.csv) orders all blocks, the
least important first, in a line of numbers with commas between.

llama.cpp (tools/quantize/quantize.cpp, src/llama-quant.cpp): `llama-quantize --prune-layers 3,5 IN OUT TYPE` leaves
out these blocks of the original model, renumbers the others and lowers the block count; type COPY changes no tensor.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from sleb.errors import ConfigError, LayerMapError
from sleb.formats.removal import Imported, Removal, block_numbers
from sleb.layer_map.units import CalibrationRecord, Unit

if TYPE_CHECKING:  # it needs torch, which reading a list does not
    from sleb.engine.model.architecture import DecoderSpec

_REFERENCE_SEQLEN = 2048  # utils/model_utils.py: model.seqlen
_ORDER = re.compile(r"^\s*Block Removal Order:\s*(\[[^\[\]]*\])", re.MULTILINE)


def write_removal_list(removal: Removal) -> str:
    """JSON, which is a Python list too."""
    return json.dumps(list(removal.whole_blocks("removal-list"))) + "\n"


def read_removal_list(text: str) -> Imported:
    """A list in JSON or Python, alone, after `removal_list =`, or as the field `removal_list` of an object; or a line
    of numbers with commas between."""
    return Imported(tuple(map(Unit, _numbers(text))))


def read_sleb_result(text: str) -> Imported:
    """One record of SLEB's result file, or of what sleb.py prints at the end."""
    orders = _ORDER.findall(text)
    if len(orders) != 1:
        raise LayerMapError(
            f"it holds {len(orders)} lines 'Block Removal Order: […]'; one result is needed: keep the one to import"
        )
    numbers = _numbers(orders[0])
    total, count = _integer(text, "# Total Blocks"), _integer(text, "# Remove Blocks")
    if count is not None and count != len(numbers):
        raise LayerMapError(f"it says '# Remove Blocks: {count}' but its removal order has {len(numbers)}")
    calibration = CalibrationRecord(
        source=_field(text, "Dataset"),
        sampler="rows",
        seed=_integer(text, "Seed"),
        seqlen=_REFERENCE_SEQLEN,
    )
    found = re.findall(r"^\s*(WikiText-2|C4) PPL = ([\d.]+)", text, re.MULTILINE)
    figures = ", ".join(f"{name} perplexity {figure}" for name, figure in found)
    return Imported(
        tuple(map(Unit, numbers)),
        num_blocks=total,
        model=_field(text, "Model Name"),
        calibration=calibration,
        source="SLEB's sleb.py" + (f": {figures} with all of these removed" if figures else ""),
    )


def write_llama_cpp(removal: Removal, spec: DecoderSpec, model: Path | None) -> str:
    """The command that prunes `model`, a GGUF file; without one the line says MODEL.gguf."""
    blocks = removal.whole_blocks("llama.cpp")
    if len(set(spec.block_rotary)) > 1 or len(set(spec.windows)) > 1:
        raise ConfigError(
            "llama.cpp tells by a block's number whether it rotates positions or slides a window, so pruning "
            f"{spec.architecture} there mixes them up: use --format hf with a tool that reads config.json"
        )
    name = str(model) if model else "MODEL.gguf"
    pruned = f"{name.removesuffix('.gguf')}-sleb-{removal.depth}.gguf"
    words = ["llama-quantize", "--prune-layers", ",".join(map(str, sorted(blocks))), name, pruned, "COPY"]
    return shlex.join(words) + "\n"


def is_order(text: str) -> bool:
    """Whether a text is the line of a CSV file: numbers with commas between."""
    return re.fullmatch(r"\s*\d{1,9}(\s*,\s*\d{1,9})+\s*", text) is not None


def _numbers(text: str) -> tuple[int, ...]:
    try:
        value = json.loads(text)
    except ValueError:
        value = _python_list(text)
    if isinstance(value, dict):
        value = value.get("removal_list")
    if not isinstance(value, list):
        raise LayerMapError("it holds no removal list, which is written like [14, 23, 11]")
    return block_numbers(value, "removal_list")


def _python_list(text: str) -> list[int] | None:
    """The only list of numbers in a text that is not JSON, such as `removal_list = [14, 23,]`; nothing is run."""
    found = [text] if is_order(text) else re.findall(r"\[([^\[\]]*)\]", text)
    if len(found) != 1 or not re.fullmatch(r"\s*(-?\d{1,9}\s*(,\s*-?\d{1,9}\s*)*,?)?\s*", found[0]):
        return None
    return [int(number) for number in found[0].split(",") if number.strip()]


def _field(text: str, name: str) -> str | None:
    found = re.search(rf"^\s*{re.escape(name)}:[ \t]*(\S.*?)\s*$", text, re.MULTILINE)
    return found[1] if found else None


def _integer(text: str, name: str) -> int | None:
    value = _field(text, name)
    if value is None:
        return None
    if not re.fullmatch(r"\d{1,9}", value):
        raise LayerMapError(f"its line '{name}: {value[:40]}' must hold a number")
    return int(value)
