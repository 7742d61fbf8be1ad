"""A client that costs little: streams of chat completions over plain sockets, in a process of its own.

    python -m sleb.benchmarks.http_client HOST PORT < one JSON list of request bodies a line

For each line it sends all bodies at once, each over a connection of its own, reads the answers to their ends and prints
one JSON object: seconds from the first byte sent to the last one read, and what was generated. It looks for the end of
a stream and counts events; it parses nothing else, so that its own work stays small beside the server's.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

_DONE = b"data: [DONE]"


async def _stream(host: str, port: int, body: dict[str, Any]) -> int:
    """Events of one streamed answer."""
    data = json.dumps(body | {"stream": True}).encode()
    reader, writer = await asyncio.open_connection(host, port)
    head = [
        "POST /v1/completions HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        "Connection: close",
    ]
    writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + data)
    num_events, tail = 0, b""
    while chunk := await reader.read(1 << 16):
        tail += chunk
        *lines, tail = tail.split(b"\n")
        num_events += sum(line.startswith(b"data: {") for line in lines)
        if any(line.startswith(_DONE) for line in lines):
            break
    else:
        raise ConnectionError(f"the stream ended early: {tail[:200]!r}")
    writer.close()
    return num_events


async def _run(host: str, port: int) -> None:
    for line in sys.stdin:
        bodies = json.loads(line)
        started = time.perf_counter()
        events = await asyncio.gather(*(_stream(host, port, body) for body in bodies))
        found = {"seconds": time.perf_counter() - started, "events": sum(events)}
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_run(sys.argv[1], int(sys.argv[2])))
