"""Layer maps in other tools' notations, and pruned checkpoints that other tools load.

| notation | reads | writes | removes | source |
|---|---|---|---|---|
| removal-list | yes | yes | blocks, in order | SLEB, `eval.py --removal_list` |
| sleb-result | yes | | blocks, in order | the text file that SLEB's `sleb.py` appends to |
| llm-drop | yes | yes | attention and MLP, in order | LLM-Drop, `drop_attn_list` and `drop_mlp_list` |
| blockpruner | yes | yes | attention and MLP, in order | BlockPruner, `…_del_order_list.json` |
| mergekit | yes | yes | blocks; attention and MLP by scale 0 | mergekit, passthrough slices |
| decilm | yes | a model | attention and MLP; holds patches | Nemotron-NAS, `block_configs` |
| linearpatch | yes | | a run of blocks, for one patch | LinearPatch, `scales.pt` as safetensors |
| hf | | a model | blocks | a smaller checkpoint of the same architecture |
| zeroed | | a model | attention and MLP; holds patches | the same shape, output projections zero |
| llama.cpp | | yes | blocks | `llama-quantize --prune-layers` |
| gguf | | a model | blocks; of a Llama attention and MLP, holds patches | a file that llama.cpp runs |

One module a notation holds what reads and what writes it; `exporting` and `importing` choose among them.
"""

from __future__ import annotations

from sleb.errors import ConfigError

FOLDER_FORMATS = ("hf", "zeroed", "decilm")
TEXT_FORMATS = ("mergekit", "removal-list", "llm-drop", "blockpruner", "llama.cpp")
EXPORT_FORMATS = (*FOLDER_FORMATS, "gguf", *TEXT_FORMATS)
GGUF_TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
IMPORT_FORMATS = (
    "auto",
    "removal-list",
    "sleb-result",
    "llm-drop",
    "blockpruner",
    "mergekit",
    "decilm",
    "linearpatch",
)


def check_format(notation: str, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError that lists the formats."""
    if notation not in allowed:
        raise ConfigError(
            f"format {notation!r} is unknown: choose {', '.join(allowed[:-1])} or {allowed[-1]}"
        )
