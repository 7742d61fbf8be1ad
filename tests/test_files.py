"""Files that appear whole or not at all, and what tells that one changed."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest

from sleb.errors import ConfigError
from sleb.files import cache_dir, check_writable, content_digest, file_state, replacement, write_text


@pytest.mark.parametrize("durable", [True, False])
def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with replacement(path, durable=durable) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_old_file_stays_alone(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def fail() -> None:
        with replacement(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_link_points_to_is_replaced(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    write_text(link, "new")
    assert link.is_symlink() and real.read_text() == "new"


def test_names_that_are_no_utf8_are_escaped(tmp_path: Path) -> None:
    write_text(tmp_path / "a", '"caf\udce9"')
    assert (tmp_path / "a").read_bytes() == b'"caf\\udce9"'


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with a name")
@pytest.mark.parametrize("write", [lambda path: write_text(path, ""), check_writable])
def test_a_device_or_pipe_is_not_replaced_by_a_file(tmp_path: Path, write) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    (link := tmp_path / "link").symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(ConfigError, match=r"cannot be written \(it is a device, pipe or socket\)"):
            write(path)
    assert pipe.is_fifo() and sorted(tmp_path.iterdir()) == [link, pipe]


@pytest.mark.parametrize("write", [lambda path: write_text(path, ""), check_writable])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, write) -> None:
    with pytest.raises(ConfigError, match=r"none/a cannot be written \(No such file or directory\); name"):
        write(tmp_path / "none" / "a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="folder"):
        write(tmp_path / "folder")
    check_writable(tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("SLEB_CACHE", "~/here")
    assert cache_dir() == Path.home() / "here"
    monkeypatch.delenv("SLEB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "sleb"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "sleb"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_dir() == Path.home() / "Library" / "Caches" / "sleb"


SIZE = 8 << 20  # more than the samples cover


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(bytes(SIZE))
    return path


def sampled(offset: int) -> bool:
    """Whether one of 64 pieces of 64 KiB, spread evenly from the first byte to the last, holds `offset`."""
    starts = [(SIZE - 65536) * index // 63 for index in range(64)]
    return any(start <= offset < start + 65536 for start in starts)


def test_a_byte_that_no_sample_holds_changes_the_state(file: Path) -> None:
    facts, before, digest = file.stat(), file_state(file), content_digest(file)
    offset = next(offset for offset in range(SIZE) if not sampled(offset))
    with file.open("r+b") as handle:
        handle.seek(offset)
        handle.write(b"\1")
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert file.stat().st_mtime_ns == facts.st_mtime_ns and file.stat().st_size == facts.st_size
    assert file_state(file) != before
    assert content_digest(file) == hashlib.sha256(file.read_bytes()).hexdigest() != digest


def test_contents_count_where_a_file_system_keeps_no_time_of_change(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, before = file.stat(), file_state(file)
    file.write_bytes(b"\1" * SIZE)
    monkeypatch.setattr(Path, "stat", lambda *_args, **_options: facts)
    assert file_state(file) != before


def test_contents_are_read_once(file: Path) -> None:
    read: list[tuple[int, int]] = []
    first = content_digest(file, lambda *counts: read.append(counts))
    assert first == hashlib.sha256(bytes(SIZE)).hexdigest() and read[-1] == (SIZE, SIZE)
    read.clear()
    assert content_digest(file, lambda *counts: read.append(counts)) == first and read == []
    moved = file.rename(file.with_name("moved"))
    assert content_digest(moved) == first


@pytest.mark.parametrize("damage", [b"", b"no digest", b"\xff" * 64])
def test_a_damaged_note_is_made_anew(damage: bytes, file: Path, tmp_path: Path) -> None:
    first = content_digest(file)
    [note] = (tmp_path / "cache" / "digests").iterdir()
    note.write_bytes(damage)
    assert content_digest(file) == first and note.read_text() == first


def test_a_cache_that_cannot_be_written_costs_no_more_than_the_reading(file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert content_digest(file) == hashlib.sha256(bytes(SIZE)).hexdigest()
