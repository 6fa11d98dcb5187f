"""Frames put together by hand are what protobuf reads and writes, and nothing else is accepted."""

from __future__ import annotations

import contextlib

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from forebay.core.errors import KvTransferError
from forebay.rpc.v1 import kv_transfer_pb2, worker_pb2
from forebay.worker.frames import (
    Frame,
    chained,
    decode_message,
    encode_commit,
    encode_frame,
    plan_frames,
)

HEADER = kv_transfer_pb2.KvFrameHeader(
    lease_id="lease-1",
    epoch="epoch-1",
    frame=3,
    layout=worker_pb2.KvLayout(version=1, num_layers=4, num_kv_heads=1, dtype=4, block_size=16),
    codec=worker_pb2.KV_CODEC_RAW,
    num_heads=1,
    layer_start=1,
    num_layers=2,
    token_start=16,
    num_tokens=5,
    protocol_version=2,
)
COMMIT = kv_transfer_pb2.KvCommit(
    lease_id="lease-1",
    epoch="epoch-1",
    num_frames=3,
    num_bytes=2**40,
    crc32c=7,
    first_tokens=[kv_transfer_pb2.FirstToken(choice=1, token_id=9)],
)


def frame_of(payload: bytes, checksum: int = 0xDEADBEEF) -> bytes:
    def fill(view: memoryview) -> int:
        view[:] = payload
        return checksum

    message, returned = encode_frame(HEADER, len(payload), fill)
    assert returned == checksum
    return message


def header_with(checksum: int) -> kv_transfer_pb2.KvFrameHeader:
    header = kv_transfer_pb2.KvFrameHeader(crc32c=checksum)
    header.MergeFrom(HEADER)
    return header


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 3_000_000])
@pytest.mark.parametrize("checksum", [0, 1, 0xDEADBEEF, 2**32 - 1])
def test_a_frame_is_a_push_request(size: int, checksum: int) -> None:
    payload = bytes(i % 251 for i in range(1000)) * (size // 1000 + 1)
    payload = payload[:size]
    data = frame_of(payload, checksum)
    header = header_with(checksum)
    message = kv_transfer_pb2.PushRequest(header=header, payload=payload)
    assert type(data) is bytes
    assert kv_transfer_pb2.PushRequest.FromString(data) == message
    for encoded in (data, message.SerializeToString()) if size else (data,):
        frame = decode_message(encoded)
        assert isinstance(frame, Frame)
        assert (frame.header, bytes(frame.payload)) == (header, payload)


@given(
    lease_id=st.text(max_size=200),
    numbers=st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8),
    checksum=st.integers(0, 2**32 - 1),
    payload=st.binary(max_size=300),
)
def test_the_checksum_stands_in_its_place_whatever_the_header(
    lease_id: str, numbers: list[int], checksum: int, payload: bytes
) -> None:
    header = kv_transfer_pb2.KvFrameHeader(
        lease_id=lease_id,
        frame=numbers[0],
        layer_start=numbers[1],
        num_layers=numbers[2],
        head_start=numbers[3],
        num_heads=numbers[4],
        token_start=numbers[5],
        num_tokens=numbers[6],
        protocol_version=numbers[7],
    )

    def fill(view: memoryview) -> int:
        view[:] = payload
        return checksum

    data, _ = encode_frame(header, len(payload), fill)
    header.crc32c = checksum
    frame = decode_message(data)
    assert isinstance(frame, Frame)
    assert (frame.header, bytes(frame.payload)) == (header, payload)
    part = frame.part
    assert (part.layer_end, part.head_end, part.token_end) == (
        numbers[1] + numbers[2],
        numbers[3] + numbers[4],
        numbers[5] + numbers[6],
    )


def test_what_a_payload_raises_goes_on() -> None:
    def fill(view: memoryview) -> int:
        raise KvTransferError("unreadable")

    with pytest.raises(KvTransferError, match="unreadable"):
        encode_frame(HEADER, 100, fill)


def test_messages_are_not_shared_and_not_changed_by_later_ones() -> None:
    payloads = [bytes([i]) * (i * 37 + 1) for i in range(50)]
    messages = [frame_of(payload, i) for i, payload in enumerate(payloads)]
    for i, (message, payload) in enumerate(zip(messages, payloads, strict=True)):
        frame = decode_message(message)
        assert isinstance(frame, Frame)
        assert (frame.header.crc32c, bytes(frame.payload)) == (i, payload)


def test_a_commit_is_a_push_request() -> None:
    message = kv_transfer_pb2.PushRequest(commit=COMMIT)
    assert encode_commit(COMMIT) == message.SerializeToString()
    assert decode_message(message.SerializeToString()) == COMMIT


@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_an_error(data: bytes) -> None:
    with contextlib.suppress(KvTransferError):
        decode_message(data)


@pytest.mark.parametrize("data", [frame_of(b"payload"), encode_commit(COMMIT)])
def test_every_truncation_is_an_error(data: bytes) -> None:
    for end in range(len(data)):
        with pytest.raises(KvTransferError):
            decode_message(data[:end])
    with pytest.raises(KvTransferError):
        decode_message(data + b"\0")
    with pytest.raises(KvTransferError):
        decode_message(data + data)


def test_every_flipped_bit_of_a_frame_is_an_error_or_shows() -> None:
    """A payload that arrives whole has the header's checksum, or the frame is not this frame."""
    payload = b"some KV bytes"
    header = header_with(crc32c(payload))
    data = frame_of(payload, header.crc32c)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            frame = decode_message(bytes(flipped))
        except KvTransferError:
            continue
        assert isinstance(frame, Frame)
        intact = frame.header == header and crc32c(frame.payload) == header.crc32c
        assert not intact


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x0a",
        b"\x12\x01a",
        b"\x1a\x80\x80\x80\x80\x80\x80\x80\x01",
        b"\x0a\x00",
        b"\x12\x01a\x0a\x00",
        encode_commit(COMMIT) + frame_of(b"x"),
        frame_of(b"x") + encode_commit(COMMIT),
    ],
)
def test_malformed_messages(data: bytes) -> None:
    with pytest.raises(KvTransferError):
        decode_message(data)


@given(
    num_layers=st.integers(1, 9),
    token_bytes=st.integers(1, 64),
    token_start=st.integers(0, 50),
    num_tokens=st.integers(0, 40),
    max_bytes=st.integers(1, 4096),
)
def test_a_plan_covers_everything_once_in_order(
    num_layers: int, token_bytes: int, token_start: int, num_tokens: int, max_bytes: int
) -> None:
    layout = worker_pb2.KvLayout(num_layers=num_layers, num_kv_heads=3)
    next_token = [token_start] * num_layers
    for part in plan_frames(layout, token_bytes, token_start, num_tokens, max_bytes):
        size = part.num_layers * part.num_tokens * token_bytes
        assert (part.head_start, part.head_end) == (0, 3)
        one_token_of_one_layer = (part.num_layers, part.num_tokens) == (1, 1)
        assert size <= max_bytes or one_token_of_one_layer
        assert part.num_layers > 0 and part.num_tokens > 0
        for layer in range(part.layer_start, part.layer_start + part.num_layers):
            assert next_token[layer] == part.token_start
            next_token[layer] += part.num_tokens
    assert next_token == [token_start + num_tokens] * num_layers


def test_a_chain_depends_on_every_value_and_their_order() -> None:
    assert chained(0, 1, 2) == chained(chained(0, 1), 2) == crc32c(b"\1\0\0\0\2\0\0\0")
    assert len({chained(0, 0), chained(0, 0, 0), chained(0, 1, 2), chained(0, 2, 1)}) == 4
    assert chained(7) == 7
