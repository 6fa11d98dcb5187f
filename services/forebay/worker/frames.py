"""KV frames on the wire: `PushRequest` messages put together and taken apart by hand, so that a
payload of a megabyte never becomes a protobuf field object.

The bytes say what kv_transfer.proto says; any protobuf implementation reads them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from crc32c import crc32c
from google.protobuf.message import DecodeError

from forebay.core.errors import KvTransferError
from forebay.engine.interface import KvSlice
from forebay.rpc.v1 import kv_transfer_pb2, worker_pb2

_HEADER_TAG = 0x0A  # field 1, length-delimited
_PAYLOAD_TAG = 0x12  # field 2
_COMMIT_TAG = 0x1A  # field 3
_CRC32C_TAG = 0x6D  # KvFrameHeader's field 13, four bytes

_new_bytes = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)
_address_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(
    ("PyBytes_AsString", ctypes.pythonapi)
)
_view_at = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)
_WRITABLE = 0x200  # PyBUF_WRITE


@dataclass(frozen=True, slots=True)
class Frame:
    """`payload` is a view into the message it came in."""

    header: kv_transfer_pb2.KvFrameHeader
    payload: memoryview

    @property
    def part(self) -> KvSlice:
        header = self.header
        return KvSlice(
            layer_start=header.layer_start,
            num_layers=header.num_layers,
            token_start=header.token_start,
            num_tokens=header.num_tokens,
            head_start=header.head_start,
            num_heads=header.num_heads,
        )


def plan_frames(
    layout: worker_pb2.KvLayout, token_bytes: int, token_start: int, num_tokens: int, max_bytes: int
) -> list[KvSlice]:
    """Cuts tokens [token_start, token_start + num_tokens) of all layers and heads into frames of at
    most `max_bytes` (but at least one token of one layer): groups of whole layers where they fit.
    `token_bytes`: what one token of one layer takes."""
    if num_tokens == 0:
        return []
    layers_each = max(1, max_bytes // (num_tokens * token_bytes))
    tokens_each = min(num_tokens, max(1, max_bytes // token_bytes))
    end = token_start + num_tokens
    return [
        KvSlice(
            layer_start=layer,
            num_layers=min(layers_each, layout.num_layers - layer),
            token_start=token,
            num_tokens=min(tokens_each, end - token),
            head_start=0,
            num_heads=layout.num_kv_heads,
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


def encode_frame(
    header: kv_transfer_pb2.KvFrameHeader, num_bytes: int, fill: Callable[[memoryview], int]
) -> tuple[bytes, int]:
    """A frame with a payload of `num_bytes`, which `fill` writes where it belongs in the message,
    and its CRC-32C, which `fill` returns and which becomes the header's: that comes in without.
    No byte of the payload is copied. What `fill` raises goes on to the caller."""
    assert not header.crc32c
    fields = header.SerializeToString()
    crc_field = bytes((_CRC32C_TAG, 0, 0, 0, 0))
    before = bytes((_HEADER_TAG,)) + _varint(len(fields) + len(crc_field)) + fields
    head = before + crc_field + bytes((_PAYLOAD_TAG,)) + _varint(num_bytes)
    message, view = _unwritten(len(head) + num_bytes)
    view[: len(head)] = head
    checksum = fill(view[len(head) :])
    crc_at = len(before) + 1
    view[crc_at : crc_at + 4] = checksum.to_bytes(4, "little")
    return message, checksum


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


def _unwritten(size: int) -> tuple[bytes, memoryview]:
    """`bytes`, which gRPC wants, whose content is the caller's to write before anybody else sees
    the object: what PyBytes_FromStringAndSize is for. The view must not outlive it."""
    message: bytes = _new_bytes(None, size)
    view: memoryview = _view_at(_address_of(message), size, _WRITABLE)
    return message, view


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
