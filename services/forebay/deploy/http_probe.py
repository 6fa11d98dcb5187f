"""One HTTP GET on loopback, for readiness checks."""

from __future__ import annotations

import asyncio


async def http_status(host: str, port: int, path: str, timeout_s: float) -> int | None:
    """The status code, or None when no HTTP answer came in time."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
                writer.write(request.encode())
                await writer.drain()
                words = (await reader.readline()).split()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else None
