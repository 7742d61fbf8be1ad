"""A server's end of a Unix socket, and its file."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from sleb.errors import ConfigError
from sleb.fields import shown_path


class UnixSocket(socket.socket):
    """A bound Unix socket, whose file goes when it is closed.

    Whoever can reach the file may connect, as with a port of 127.0.0.1: the rights of its folder say who that is. One
    that was left by a server which is no more is replaced.

    Raises ConfigError when the path cannot be had.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self._file: tuple[int, int] | None = None
        self.path = path.absolute()
        try:
            self._remove_stale()
            self.bind(str(self.path))
            os.chmod(self.path, 0o666)  # as uvicorn's own
        except OSError as error:
            self.close()
            raise self._refusal(error) from None
        self._file = self._identity()

    def check(self) -> None:
        """Raises ConfigError when another server has taken the path, as it can while this one does not listen yet."""
        if self._identity() != self._file:
            raise self._refusal(OSError(errno.EADDRINUSE, ""))

    def close(self) -> None:
        super().close()
        if self._file is not None and self._identity() == self._file:
            with suppress(OSError):
                self.path.unlink()
        self._file = None

    def _identity(self) -> tuple[int, int] | None:
        with suppress(OSError):
            found = self.path.stat()
            return found.st_dev, found.st_ino
        return None

    def _remove_stale(self) -> None:
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(self.path.lstat().st_mode):
                return  # somebody's file: binding fails
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(str(self.path))
                except ConnectionRefusedError:
                    self.path.unlink()

    def _refusal(self, error: OSError) -> ConfigError:
        where = f"--uds {shown_path(self.path)}"
        if error.errno == errno.EADDRINUSE:
            with suppress(OSError):
                if not stat.S_ISSOCK(self.path.lstat().st_mode):
                    return ConfigError(f"{where} is there already and is no socket; choose another path")
            return ConfigError(f"{where} is in use by another server; choose another path")
        if error.errno is None:  # Python's own, of a path that does not fit into an address
            return ConfigError(f"{where} is too long; a path of about 100 bytes fits")
        return ConfigError(f"cannot listen on {where}: {error.strerror}")
