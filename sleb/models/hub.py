"""Snapshots of Hugging Face repositories: safetensors, configuration and tokenizer files, never code or pickles."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sleb.errors import ModelError
from sleb.models.store import build_once
from sleb.models.weight_files import INDEX, NOT_WEIGHTS, read_index

_ROOT = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]
_TEMPLATES = "additional_chat_templates"
WANTED = [*_ROOT, f"{_TEMPLATES}/*.jinja"]
# Patterns match across slashes: subfolders hold other formats, and these names other layouts of the same weights.
UNWANTED = [*(f"*/{name}" for name in _ROOT), f"{_TEMPLATES}/*/*", *NOT_WEIGHTS]


def snapshot(repository: str, to: Path | None = None, *, progress: bool = True) -> Path:
    """The folder of a hub repository's model files, downloaded where they are missing.

    In huggingface_hub's own cache, which resumes what was interrupted; with `to`, also there, whole or not at
    all. HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT and HF_TOKEN mean what they mean there. Raises ModelError with the
    remedy.
    """
    folder = _checked(repository, _download(repository, progress))
    if to is None:
        return folder

    def build(target: Path, scratch: Path) -> None:
        for file in sorted([*folder.iterdir(), *(folder / _TEMPLATES).glob("*.jinja")]):
            if file.is_file():
                place = target / file.relative_to(folder)
                place.parent.mkdir(exist_ok=True)
                _link_or_copy(file.resolve(), place)

    return build_once(to, {"repository": repository, "revision": folder.name}, build)


def config_folder(repository: str) -> Path:
    """A folder with the config.json of a hub repository, and whatever else of it is in the cache. ModelError."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, "config.json")).parent
    except Exception as error:
        raise ModelError(_explain(repository, error)) from error


def _download(repository: str, progress: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    silenced = not progress and not are_progress_bars_disabled()
    if silenced:
        disable_progress_bars()
    try:
        return Path(snapshot_download(repository, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except Exception as error:
        raise ModelError(_explain(repository, error)) from error
    finally:
        if silenced:
            enable_progress_bars()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _checked(repository: str, folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{repository} has no config.json: it is not a transformers model. If it holds .gguf files, "
            "download one and give its path"
        )
    weights = {file.name for file in folder.glob("*.safetensors")}
    if not weights:
        raise ModelError(
            f"{repository} has no safetensors weights, and pickled ones (.bin, .pt) are not loaded, since they "
            "can run code: choose a repository with safetensors, or convert it at "
            "huggingface.co/spaces/safetensors/convert"
        )
    if (folder / INDEX).is_file():
        named = {path.name for path in read_index(folder / INDEX).values()}
        if missing := sorted(named - weights):
            raise ModelError(
                f"the local copy of {repository} lacks {len(missing)} of {len(named)} weight files "
                f"({missing[0]}, …): fetch it again with the hub in reach"
            )
    return folder


def _explain(repository: str, error: Exception) -> str:
    """What went wrong with `repository`, and what to do about it."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repository}"
    if isinstance(error, errors.GatedRepoError):
        return f"{repository} is gated: accept its terms at {page}, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no folder {repository!r} here and no such repository on the hub: check the spelling "
            f"({page}); if it is private, run `hf auth login`"
        )
    if isinstance(error, errors.HFValidationError):
        return f"{repository!r} is neither a folder nor a valid hub id (owner/name)"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            f"there is no folder {repository!r} here, {repository} is not in the local cache, and the hub cannot "
            "be reached: check the network, unset HF_HUB_OFFLINE if it is set, or give a local folder"
        )
    if (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, errors.HfHubHTTPError)
    ):
        return (
            f"{repository} cannot be stored ({error}): free some space, or point HF_HOME (or --to) elsewhere"
        )
    reason = f"{type(error).__name__}: {error}"
    return f"fetching {repository} from the hub failed ({reason}): check the network, then try again"
