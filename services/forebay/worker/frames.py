"""KV frames on the wire: `PushRequest` messages put together and taken apart by hand, so that a
payload of a megabyte never becomes a protobuf field object.

The bytes are exactly those of kv_transfer.proto; any protobuf implementation reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

from crc32c import crc32c
from google.protobuf.message import DecodeError

from forebay.core.errors import KvTransferError
from forebay.rpc.v1 import kv_transfer_pb2, worker_pb2

_HEADER_TAG = 0x0A  # field 1, length-delimited
_PAYLOAD_TAG = 0x12  # field 2
_COMMIT_TAG = 0x1A  # field 3


@dataclass(frozen=True, slots=True)
class Frame:
    """`payload` is a view into the message it came in."""

    header: kv_transfer_pb2.KvFrameHeader
    payload: memoryview


@dataclass(frozen=True, slots=True)
class FrameSlice:
    """Which part of a prompt's KV one frame carries."""

    layer_start: int
    num_layers: int
    token_start: int
    num_tokens: int

    @property
    def layer_end(self) -> int:
        return self.layer_start + self.num_layers

    @property
    def token_end(self) -> int:
        return self.token_start + self.num_tokens


def plan_frames(
    layout: worker_pb2.KvLayout, token_start: int, num_tokens: int, max_bytes: int
) -> list[FrameSlice]:
    """Cuts tokens [token_start, token_start + num_tokens) of all layers into frames of at most
    `max_bytes` (but at least one token of one layer): groups of whole layers where they fit."""
    if num_tokens == 0:
        return []
    layer_bytes = num_tokens * layout.bytes_per_token_layer
    layers_each = max(1, max_bytes // layer_bytes)
    tokens_each = min(num_tokens, max(1, max_bytes // layout.bytes_per_token_layer))
    end = token_start + num_tokens
    return [
        FrameSlice(
            layer, min(layers_each, layout.num_layers - layer), token, min(tokens_each, end - token)
        )
        for layer in range(0, layout.num_layers, layers_each)
        for token in range(token_start, end, tokens_each)
    ]


def chained(checksum: int, *values: int) -> int:
    """CRC-32C `checksum` continued over each value as four little-endian bytes: over the checksums
    of a push's frames in order, then choice and token id of each first token."""
    for value in values:
        checksum = crc32c(value.to_bytes(4, "little"), checksum)
    return checksum


def encode_frame(header: kv_transfer_pb2.KvFrameHeader, payload: bytes) -> bytes:
    head = header.SerializeToString()
    return b"".join(
        (
            bytes((_HEADER_TAG,)),
            _varint(len(head)),
            head,
            bytes((_PAYLOAD_TAG,)),
            _varint(len(payload)),
            payload,
        )
    )


def encode_commit(commit: kv_transfer_pb2.KvCommit) -> bytes:
    body = commit.SerializeToString()
    return b"".join((bytes((_COMMIT_TAG,)), _varint(len(body)), body))


def decode_message(data: bytes) -> Frame | kv_transfer_pb2.KvCommit:
    """Raises KvTransferError for anything but one frame or one commit."""
    view = memoryview(data)
    try:
        tag, body, rest = _field(view)
        if tag == _COMMIT_TAG and not rest:
            return kv_transfer_pb2.KvCommit.FromString(bytes(body))
        payload_tag, payload, rest = _field(rest)
        if tag == _HEADER_TAG and payload_tag == _PAYLOAD_TAG and not rest:
            header = kv_transfer_pb2.KvFrameHeader.FromString(bytes(body))
            return Frame(header, payload)
    except (IndexError, DecodeError) as error:
        raise KvTransferError("KV message is malformed") from error
    raise KvTransferError("KV message is neither a frame nor a commit")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(view: memoryview) -> tuple[int, memoryview, memoryview]:
    """Tag, content and what follows. Raises IndexError when `view` is too short."""
    tag, length, shift, at = view[0], 0, 0, 1
    while True:
        byte = view[at]
        length |= (byte & 0x7F) << shift
        shift += 7
        at += 1
        if byte < 0x80:
            break
        if shift > 35:
            raise IndexError("length of more than 35 bits")
    if at + length > len(view):
        raise IndexError("field is cut off")
    return tag, view[at : at + length], view[at + length :]
