"""The public gRPC service as an async Python client. Needs the base install only."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from forebay.core.errors import InternalError, Unavailable
from forebay.rpc.status import from_grpc
from forebay.rpc.v1 import inference_pb2, inference_pb2_grpc

DEFAULT_TIMEOUT_S = 600.0
LIST_TIMEOUT_S = 10.0

Event = inference_pb2.GenerateChunk | inference_pb2.GenerateComplete

_OPTIONS = (
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)


class ForebayClient:
    """Talks to one gateway; use it as an async context manager, on one event loop.

    Every failure arrives as a ForebayError, as the gateway raised it.
    """

    def __init__(self, address: str) -> None:
        """`address`: host:port. Connects on first use."""
        self._address = address
        self._channel: Any = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def __aenter__(self) -> ForebayClient:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def generate(
        self, request: inference_pb2.GenerateRequest, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> AsyncIterator[Event]:
        """Chunks, then one GenerateComplete. Leaving the iteration early (with `aclose`) ends the
        request on the gateway."""
        call = self._stub.Generate(request, timeout=timeout_s)
        complete = False
        try:
            async for response in call:
                kind = response.WhichOneof("event")
                if kind == "chunk":
                    yield response.chunk
                elif kind == "complete":
                    complete = True
                    yield response.complete
                # An `error` event is followed by a status that says the same and more.
        except grpc.aio.AioRpcError as error:
            raise self._translated(error) from error
        finally:
            call.cancel()
        if not complete:
            raise InternalError("the gateway ended the stream without completing the request")

    async def chat(
        self,
        model: str,
        messages: Sequence[inference_pb2.ChatMessage],
        sampling: inference_pb2.SamplingParams | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> AsyncIterator[Event]:
        """`generate` for a conversation; unset sampling parameters take the gateway's defaults."""
        request = inference_pb2.GenerateRequest(
            model=model, chat=inference_pb2.Chat(messages=messages), sampling=sampling
        )
        events = self.generate(request, timeout_s)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()  # type: ignore[attr-defined]  # a generator underneath

    async def list_models(self, timeout_s: float = LIST_TIMEOUT_S) -> list[inference_pb2.ModelCard]:
        call = self._stub.ListModels(inference_pb2.ListModelsRequest(), timeout=timeout_s)
        try:
            response: inference_pb2.ListModelsResponse = await call
        except grpc.aio.AioRpcError as error:
            raise self._translated(error) from error
        finally:
            call.cancel()
        return list(response.models)

    def _translated(self, error: grpc.aio.AioRpcError) -> Exception:
        trailing: Any = error.trailing_metadata()
        metadata = dict(trailing or ())
        details = error.details() or ""
        if error.code() is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details:
            return Unavailable(f"no gateway answers on {self._address}")
        return from_grpc(error.code(), details, metadata)
