"""Bodies of requests as they come in: bounded each and all together, in size and in time."""

from __future__ import annotations

import asyncio

from fastapi import Request

from sleb.server.errors import ApiError, shorten

_LEAST_RATE = 16 * 1024  # bytes a second, beside the time that any body has
_NUM_AT_ONCE = 32  # bodies of the largest size that may be half read


class BodyReader:
    """Reads bodies; belongs to the event loop.

    Args:
        max_bytes: of a body.
        timeout: seconds that any body may take; a second more for each 16 KiB that came.
    """

    def __init__(self, max_bytes: int, timeout: float) -> None:
        self.max_bytes = max_bytes
        self._timeout = timeout
        self._under_way: dict[asyncio.Timeout, int] = {}  # bytes that came, the oldest body first
        self._num_bytes = 0

    async def read(self, request: Request) -> bytes:
        """The body.

        Raises ApiError 413 as soon as it is known to be too large, whether or not it says so first, and 408 for one
        that takes too long, or longest of all while too much is half read, and 415 for a compressed one.
        """
        if int(request.headers.get("content-length") or 0) > self.max_bytes:
            raise self._too_large()
        encoding = request.headers.get("content-encoding") or "identity"
        if encoding.lower() != "identity":
            raise ApiError(
                415, f"the body has Content-Encoding {shorten(encoding)}; send it without compression"
            )
        try:
            async with asyncio.timeout(self._timeout) as limit:
                try:
                    return await self._read(request, limit)
                finally:
                    self._num_bytes -= self._under_way.pop(limit, 0)
        except TimeoutError:
            raise ApiError(
                408, "the body did not come in time; send it again", headers={"Connection": "close"}
            ) from None

    async def _read(self, request: Request, limit: asyncio.Timeout) -> bytes:
        chunks: list[bytes] = []
        begin = asyncio.get_running_loop().time()
        num_bytes = 0
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > self.max_bytes:
                raise self._too_large()
            chunks.append(chunk)
            self._under_way[limit] = num_bytes
            self._num_bytes += len(chunk)
            self._reschedule(limit, begin + self._timeout + num_bytes / _LEAST_RATE)
            if self._num_bytes > _NUM_AT_ONCE * self.max_bytes:
                self._reschedule(next(iter(self._under_way)), begin)
        return b"".join(chunks)

    @staticmethod
    def _reschedule(limit: asyncio.Timeout, when: float) -> None:
        if not limit.expired():  # else its task ends when its turn comes
            limit.reschedule(when)

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than {self.max_bytes} bytes, which is what this server takes"
        )
