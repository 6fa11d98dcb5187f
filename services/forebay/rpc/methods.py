"""The methods of the internal services, as the connector wants them."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import Message

from forebay.rpc.connector import Method
from forebay.rpc.v1 import kv_transfer_pb2, worker_pb2

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)

PROTOCOL_VERSION = 2
"""Of the messages between gateways and workers; only processes of one version work together."""

WORKER_SERVICE = "forebay.rpc.v1.WorkerService"
KV_TRANSFER_SERVICE = "forebay.rpc.v1.KvTransferService"


def _method(
    service: str, name: str, request: type[_Request], response: type[_Response]
) -> Method[_Request, _Response]:
    return Method(
        service=service,
        name=name,
        encode_request=request.SerializeToString,
        decode_request=request.FromString,
        encode_response=response.SerializeToString,
        decode_response=response.FromString,
    )


def _identity(data: bytes) -> bytes:
    return data


DESCRIBE = _method(
    WORKER_SERVICE, "Describe", worker_pb2.DescribeRequest, worker_pb2.DescribeResponse
)
GET_TOKENIZER = _method(
    WORKER_SERVICE, "GetTokenizer", worker_pb2.GetTokenizerRequest, worker_pb2.GetTokenizerResponse
)
RESERVE = _method(WORKER_SERVICE, "Reserve", worker_pb2.ReserveRequest, worker_pb2.ReserveResponse)
PREFILL = _method(WORKER_SERVICE, "Prefill", worker_pb2.PrefillRequest, worker_pb2.PrefillResponse)
SEND_PREFIX = _method(
    WORKER_SERVICE, "SendPrefix", worker_pb2.SendPrefixRequest, worker_pb2.SendPrefixResponse
)
STEPS = _method(WORKER_SERVICE, "Steps", worker_pb2.StepsRequest, worker_pb2.StepsResponse)
ABORT = _method(WORKER_SERVICE, "Abort", worker_pb2.AbortRequest, worker_pb2.AbortResponse)
DRAIN = _method(WORKER_SERVICE, "Drain", worker_pb2.DrainRequest, worker_pb2.DrainResponse)

KV_PUSH: Method[bytes, kv_transfer_pb2.PushResponse] = Method(
    service=KV_TRANSFER_SERVICE,
    name="Push",
    encode_request=_identity,
    decode_request=_identity,
    encode_response=kv_transfer_pb2.PushResponse.SerializeToString,
    decode_response=kv_transfer_pb2.PushResponse.FromString,
)
"""Requests are `PushRequest` messages as bytes; see forebay.worker.frames."""
