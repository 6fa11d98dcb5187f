"""Clients that go away in the middle, over plain sockets and over gRPC."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from forebay.rpc.v1 import inference_pb2, inference_pb2_grpc
from forebay_loadtest.departures import Departure, Pace, Phase, Seen, Way

LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Request:
    """The same over both protocols. Greedy, so that every run has as many chunks."""

    model: str
    prompt: str
    max_tokens: int

    def http(self) -> tuple[bytes, bytes]:
        """Head and body."""
        messages = [{"role": "user", "content": self.prompt}]
        fields = {"model": self.model, "messages": messages, "max_tokens": self.max_tokens}
        body = json.dumps({**fields, "temperature": 0, "stream": True}).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode(), body

    def grpc(self) -> inference_pb2.GenerateRequest:
        message = inference_pb2.ChatMessage(role="user", content=self.prompt)
        return inference_pb2.GenerateRequest(
            model=self.model,
            chat=inference_pb2.Chat(messages=[message]),
            sampling=inference_pb2.SamplingParams(temperature=0, max_tokens=self.max_tokens),
        )


class LeavingClients:
    """Of one gateway. Use it as an async context manager."""

    def __init__(self, http_port: int, grpc_address: str) -> None:
        self._http_port = http_port
        self._channel: Any = grpc.aio.insecure_channel(grpc_address)
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def __aenter__(self) -> LeavingClients:
        return self

    async def __aexit__(self, *reason: object) -> None:
        await self._channel.close()

    async def pace(self, request: Request) -> Pace:
        """Of a request that nothing disturbs."""
        began = time.monotonic()
        first_s, num_chunks = 0.0, 0
        async for response in self._stub.Generate(request.grpc(), timeout=LIMIT_S):
            if response.WhichOneof("event") == "chunk" and response.chunk.text:
                first_s = first_s or time.monotonic() - began
                num_chunks += 1
        return Pace(first_s, time.monotonic() - began, num_chunks)

    async def run(self, request: Request, departure: Departure) -> Seen:
        if departure.way in (Way.CLOSE, Way.RESET):
            return await self._over_http(request, departure)
        return await self._over_grpc(request, departure)

    async def _over_http(self, request: Request, departure: Departure) -> Seen:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._http_port)
        head, body = request.http()
        whole = departure.phase is not Phase.BODY
        writer.write(head + (body if whole else body[: len(body) // 2]))
        await writer.drain()
        progress = _Progress(departure.after_chunks)
        patience = LIMIT_S if departure.after_s is None else departure.after_s
        try:
            async with asyncio.timeout(patience):
                await progress.read(reader)
        except TimeoutError:
            pass
        finally:
            if departure.way is Way.RESET:
                writer.transport.abort()
            else:
                writer.close()
        return Seen(departure, progress.num_chunks, progress.ended, progress.error)

    async def _over_grpc(self, request: Request, departure: Departure) -> Seen:
        deadline = departure.after_s if departure.way is Way.DEADLINE else LIMIT_S
        call = self._stub.Generate(request.grpc(), timeout=deadline)
        num_chunks, ended, error = 0, False, ""
        patience = departure.after_s if departure.way is Way.CANCEL else None
        try:
            async with asyncio.timeout(patience):
                async for response in call:
                    kind = response.WhichOneof("event")
                    num_chunks += kind == "chunk" and bool(response.chunk.text)
                    ended = kind == "complete"
                    if departure.after_chunks is not None and num_chunks >= departure.after_chunks:
                        break
        except TimeoutError:
            pass
        except grpc.aio.AioRpcError as failure:
            if failure.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                error = f"{failure.code().name}: {failure.details()}"
        finally:
            call.cancel()
        return Seen(departure, num_chunks, ended, error)


class _Progress:
    """Counts the text chunks of an HTTP response as its lines come."""

    def __init__(self, wanted: int | None) -> None:
        self.num_chunks = 0
        self.ended = False
        self.error = ""
        self._wanted = wanted

    async def read(self, reader: asyncio.StreamReader) -> None:
        """Until the wanted chunk, or the end."""
        while self._wanted is None or self.num_chunks < self._wanted:
            line = await reader.readline()
            if not line or line == b"data: [DONE]\n":
                self.ended = True
                return
            if line.startswith(b"HTTP/1.1") and b" 200 " not in line:
                self.error = line.decode(errors="replace").strip()
            if line.startswith(b"data: ") and b'"delta":{"content":' in line:
                self.num_chunks += 1
