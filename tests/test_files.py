"""Files that appear whole or not at all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sleb.errors import ConfigError
from sleb.files import cache_dir, check_writable, replacement, write_text


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
