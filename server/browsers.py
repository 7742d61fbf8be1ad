"""What a browser may do here: nothing on behalf of a page that was not told of the server.

A page of any site can send requests to an address in its visitor's network. A name of its own that it makes point to
that address (DNS rebinding) even lets it read the answers: hence `Host` must be a name of this server. Addresses, and
names that no public name server answers for, cannot be made to point elsewhere.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers

from sleb.server.errors import ApiError, shorten

_PRIVATE = (".localhost", ".local", ".internal", ".home.arpa")  # RFC 6761, 6762, 8375 and ICANN's reservation
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class Callers:
    """The names of a server, and the pages that may use it.

    Args:
        host: where it listens. allowed: further names, or * for any. origins: pages of other sites, or *.
    """

    def __init__(self, host: str, allowed: Iterable[str], origins: Iterable[str]) -> None:
        self._names = {host.lower(), socket.gethostname().lower(), *(name.lower() for name in allowed)}
        self._origins = frozenset(origins)

    def check(self, method: str, headers: Headers) -> None:
        """Raises ApiError 403 for a name that is not the server's, and for a page of another site that sends something.

        Clients that are no browsers send no Origin, or their own scheme in it, and are not meant.
        """
        host = _name(headers.get("host", ""))
        if host and not self._knows(host):
            raise ApiError(
                403,
                f"the Host {shorten(host)} is not a name of this server; --allowed-host lets it",
                code="host_not_allowed",
            )
        if method in _SAFE_METHODS or "*" in self._origins:
            return
        origin = headers.get("origin", "").lower()
        if origin:  # of an extension or a desktop application it has a scheme of its own
            is_page = origin == "null" or origin.startswith(("http://", "https://"))
        else:
            is_page = headers.get("sec-fetch-site", "").lower() == "cross-site"
        if (
            is_page
            and origin not in self._origins
            and _name(origin.partition("://")[2]) not in {host, *self._names}
        ):
            raise ApiError(
                403,
                f"a page of {shorten(origin or 'another site')} may not use this server; --cors-origin lets it",
                code="origin_not_allowed",
            )

    def _knows(self, name: str) -> bool:
        if "." not in name or name.endswith(_PRIVATE) or _is_address(name):
            return True
        return "*" in self._names or name in self._names


def _name(host: str) -> str:
    """A host without its port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
