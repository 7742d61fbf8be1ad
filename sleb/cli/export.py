"""`sleb export`: a pruned model, or what it lacks, in the form that other tools read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.progress import BarColumn, DownloadColumn, TimeElapsedColumn, TransferSpeedColumn

from sleb.cli.options import AnyModel, with_options
from sleb.cli.progress import Bar
from sleb.cli.show import find_map
from sleb.formats import EXPORT_FORMATS, GGUF_TYPES
from sleb.formats.removal import PATCH_WAYS, Mending, Removal, check_way
from sleb.models.resolve import shipped_map
from sleb.options import option, option_of
from sleb.pruning.options import PruneOptions
from sleb.terminal import tell


@dataclass(frozen=True)
class ExportOptions:
    """What is written, and where."""

    format: str = option("hf", "What is written.", choices=tuple(EXPORT_FORMATS))
    output: Path | None = option(
        None, "Folder (hf, zeroed, decilm) or file (gguf and texts).", unset="standard output", flags=("-o",)
    )
    layer_map: str | None = option(
        None, "A map file, or the name of a shipped map.", unset="the alias's own", metavar="FILE"
    )
    depth: int | None = option(None, "How many removals.", unset="the map's recommended depth", minimum=0)
    max_shard_size: str = option("5GB", "Largest weight file: 5GB, 500MB.", metavar="SIZE")
    gguf_type: str = option(
        "auto", "Of the matrices in a GGUF file; auto: as they are stored.", choices=GGUF_TYPES
    )
    patches: str = option(
        "keep",
        "Those of the depth: written exactly (decilm, zeroed, a Llama's gguf), merged into the blocks before them (hf, "
        "gguf), or left out.",
        choices=PATCH_WAYS,
    )
    calibration: str | Path | None = option_of(
        PruneOptions,
        "calibration",
        None,
        help="The text to merge patches on, as for `sleb prune`.",
        unset="none",
    )
    windows: int | None = option_of(PruneOptions, "windows")
    seqlen: int | None = option_of(PruneOptions, "seqlen")
    force: bool = option(False, "Replace the output if it exists.")


@with_options
def export(model: AnyModel, options: ExportOptions) -> None:
    """Write a model at one depth of a layer map for other tools.

    hf is a smaller checkpoint; zeroed keeps the shape; decilm can lack attention or MLP alone; gguf is a file for
    llama.cpp. The other formats are texts: a mergekit configuration, lists of what is removed, and a command for
    llama.cpp.
    """
    name = options.layer_map or shipped_map(model)
    chosen = None if name is None else find_map(str(name))
    if chosen is not None:  # the depth, before all else
        check_way(
            Removal(chosen, chosen.depth if options.depth is None else options.depth),
            options.format,
            options.patches,
        )
    from sleb.formats.exporting import export_model, parse_size  # torch: not for help
    from sleb.formats.provenance import lost

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    with Bar(*columns) as bar:
        removal, written = export_model(
            model,
            options.format,
            options.output,
            layer_map=chosen,
            depth=options.depth,
            patches=options.patches,
            merge=_merger(model, options, bar),
            force=options.force,
            shard_bytes=parse_size(options.max_shard_size),
            gguf_type=options.gguf_type,
            progress=lambda done, total: bar.show("writing weights", done, total),
        )
    if text := lost(removal):
        tell(f"note: {text}")
    if options.output is None:
        typer.echo(written, nl=False)
        return
    kept, total = len(removal.kept_blocks), removal.layer_map.num_blocks
    number = len(removal.mending.kept)
    with_patches = f" and {number} patch{'es' * (number > 1)}" if number else ""
    tell(f"Written to {options.output}: depth {removal.depth}, {kept} of {total} blocks{with_patches}")


def _merger(model: str, options: ExportOptions, bar: Bar) -> Callable[[Removal], Mending] | None:
    from sleb.formats.merging import merge_patches

    if options.calibration is None:
        return None
    text = PruneOptions(calibration=options.calibration, windows=options.windows, seqlen=options.seqlen)
    text.check_texts()
    return lambda removal: merge_patches(
        model,
        removal,
        text,
        progress=lambda done, total: bar.show("merging patches", done, total),
        notation=options.format,
    )
