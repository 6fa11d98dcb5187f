"""The default model's KV from one worker to another over real gRPC, raw and in fp8."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forebay.core.clock import Deadline
from forebay.core.errors import KvTransferError
from forebay.core.kv_codec import KvCodec
from forebay.core.settings import EngineSettings
from forebay.engine.interface import Runner
from forebay.engine.loader import load_runner
from forebay.rpc import methods
from forebay.rpc.connector import Channel
from forebay.rpc.grpc_connector import GrpcConnector
from forebay.rpc.v1 import kv_transfer_pb2, worker_pb2
from served_workers import Served, served, spec, until

NUM_TOKENS = 90
PROMPT = [(17 * i * i + 5 * i) % 20_000 + 100 for i in range(NUM_TOKENS)]
HEAD_TOKENS = 30 * 2 * 3 * NUM_TOKENS
BYTES = {KvCodec.RAW: HEAD_TOKENS * 64 * 4, KvCodec.FP8: HEAD_TOKENS * (64 + 4)}


@pytest.fixture(scope="module")
def runners(default_model_path: Path) -> tuple[Runner, Runner]:
    """Their KV memory goes from test to test."""
    engine = EngineSettings(
        model_path=str(default_model_path), dtype="fp32", num_blocks=32, num_threads=1
    )
    return load_runner(engine), load_runner(engine)


async def through_pools(
    prefill: Served, decode: Served, request: worker_pb2.SequenceSpec
) -> list[int]:
    """The first token comes from the one, the rest from the other."""
    await prefill.prefill(request, target=await decode.reserve(request))
    await until(lambda: any(o.request_id == request.request_id for o in prefill.outputs))
    first = next(o for o in prefill.outputs if o.request_id == request.request_id)
    assert not first.error
    return [*first.token_ids, *await decode.rest(request)]


async def test_the_codec_is_the_senders_choice_and_counts_in_bytes(
    runners: tuple[Runner, Runner],
) -> None:
    async with (
        served(kv_codec=KvCodec.FP8, kv_frame_kib=256, runner=runners[0]) as prefill,
        served(kv_frame_kib=256, runner=runners[1]) as decode,
    ):
        assert list(decode.worker.description().kv_codecs) == [1, 2]
        expected = await decode.answer(spec("alone", PROMPT, max_tokens=8))
        request = spec("fp8", PROMPT, max_tokens=8)
        request.cache_root = bytes(15) + b"1"
        answer = await through_pools(prefill, decode, request)
        assert len(answer) == len(expected) == 8
        assert answer[0] == expected[0], "the first token is sampled where the KV was computed"
        for counted in (
            prefill.worker.description().counters.kv_bytes_sent,
            decode.worker.description().counters.kv_bytes_received,
        ):
            assert counted == BYTES[KvCodec.FP8]
        prompt = [token + 1 for token in PROMPT]
        other_way = spec("raw", prompt, max_tokens=8)
        assert await through_pools(decode, prefill, other_way) == await decode.answer(
            spec("alone too", prompt, max_tokens=8)
        )
        assert decode.worker.description().counters.kv_bytes_sent == BYTES[KvCodec.RAW]
        await until(lambda: prefill.is_empty and decode.is_empty)


class Tampered:
    """Implements `Channel` and its connector: flips a bit in the middle of the second message of
    every push, as long as `armed`."""

    def __init__(self) -> None:
        self.armed = True
        self._channel: Channel | None = None

    def connect(self, address: str) -> Tampered:
        self._channel = GrpcConnector().connect(address)
        return self

    async def push(
        self, method: object, messages: AsyncIterator[bytes], deadline: Deadline
    ) -> kv_transfer_pb2.PushResponse:
        async def altered() -> AsyncIterator[bytes]:
            number = 0
            async for message in messages:
                if number == 1 and self.armed:
                    middle = len(message) // 2
                    flipped = bytes([message[middle] ^ 1])
                    message = message[:middle] + flipped + message[middle + 1 :]
                yield message
                number += 1

        assert self._channel is not None
        return await self._channel.push(methods.KV_PUSH, altered(), deadline)

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()


@pytest.mark.parametrize("codec", KvCodec)
async def test_a_corrupt_byte_on_the_way_is_refused_and_nothing_of_it_stays(
    runners: tuple[Runner, Runner], codec: KvCodec
) -> None:
    async with (
        served(kv_codec=codec, kv_frame_kib=64, runner=runners[0]) as prefill,
        served(runner=runners[1]) as decode,
    ):
        tampered = Tampered()
        prefill.worker._traffic._transport._connector = tampered
        request = spec("corrupt", PROMPT, max_tokens=8)
        await prefill.prefill(request, target=await decode.reserve(request))
        await until(lambda: any(o.error for o in prefill.outputs))
        assert [o.error for o in prefill.outputs if o.error] == ["the KV transfer failed"]
        blocks = decode.worker.load().kv_blocks
        assert (blocks.leased, blocks.cached) == (6, 0)
        counters = decode.worker.description().counters
        assert (counters.kv_transfer_failures, counters.generation_tokens) == (1, 0)
        abort = worker_pb2.AbortRequest(request_id="corrupt", gateway_id="g", attempt=1)
        await decode.channel.unary(methods.ABORT, abort, Deadline.after(5))
        await until(lambda: decode.is_empty and prefill.is_empty)
        assert decode.worker.load().kv_blocks.cached == 0
        tampered.armed = False
        again = spec("again", PROMPT, max_tokens=8)
        answer = await through_pools(prefill, decode, again)
        if codec is KvCodec.RAW:
            assert answer == await prefill.answer(spec("alone", PROMPT, max_tokens=8))


async def test_a_frame_of_an_unknown_codec_is_refused_over_the_wire() -> None:
    async with served() as decode:
        target = await decode.reserve(spec("r"))
        header = kv_transfer_pb2.KvFrameHeader(
            lease_id=target.lease_id,
            epoch=target.epoch,
            layout=decode.worker.description().kv_layout,
            codec=77,  # type: ignore[arg-type]
            num_layers=1,
            num_heads=1,
            num_tokens=1,
            protocol_version=methods.PROTOCOL_VERSION,
        )
        message = kv_transfer_pb2.PushRequest(header=header, payload=bytes(8))

        async def messages() -> AsyncIterator[bytes]:
            yield message.SerializeToString()

        with pytest.raises(KvTransferError, match="unknown KV codec 77"):
            await decode.channel.push(methods.KV_PUSH, messages(), Deadline.after(5))
