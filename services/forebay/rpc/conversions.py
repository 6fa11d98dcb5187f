"""Between protobuf messages and the plain data of core; each pair of types in one place."""

from __future__ import annotations

from typing import Any, cast

from forebay.core.finish import FinishReason
from forebay.core.kv_codec import KvCodec
from forebay.core.roles import WorkerRole
from forebay.core.sampling import SamplingParams
from forebay.rpc.v1 import inference_pb2, worker_pb2

_SCALARS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "max_tokens",
    "n",
    "top_logprobs",
)

_FINISH_TO_PROTO: dict[FinishReason, inference_pb2.FinishReason.ValueType] = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: inference_pb2.FINISH_REASON_TOOL_CALLS,
    FinishReason.CONTENT_FILTER: inference_pb2.FINISH_REASON_CONTENT_FILTER,
    FinishReason.ABORT: inference_pb2.FINISH_REASON_ABORT,
    FinishReason.ERROR: inference_pb2.FINISH_REASON_ERROR,
}
_FINISH_FROM_PROTO = {value: key for key, value in _FINISH_TO_PROTO.items()}

_ROLE_TO_PROTO: dict[WorkerRole, worker_pb2.WorkerRole.ValueType] = {
    WorkerRole.PREFILL: worker_pb2.WORKER_ROLE_PREFILL,
    WorkerRole.DECODE: worker_pb2.WORKER_ROLE_DECODE,
    WorkerRole.MIXED: worker_pb2.WORKER_ROLE_MIXED,
}
_ROLE_FROM_PROTO = {value: key for key, value in _ROLE_TO_PROTO.items()}
_CODEC_TO_PROTO: dict[KvCodec, worker_pb2.KvCodec.ValueType] = {
    KvCodec.RAW: worker_pb2.KV_CODEC_RAW,
    KvCodec.FP8: worker_pb2.KV_CODEC_FP8,
}
_CODEC_FROM_PROTO = {value: key for key, value in _CODEC_TO_PROTO.items()}


def sampling_to_proto(params: SamplingParams) -> inference_pb2.SamplingParams:
    """Every field is set. Stop strings stay behind: the gateway watches for them."""
    message = inference_pb2.SamplingParams(
        logit_bias=dict(params.logit_bias),
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
    )
    for name in _SCALARS:
        value = getattr(params, name)
        if value is not None:
            setattr(message, name, value)
    return message


def sampling_from_proto(message: inference_pb2.SamplingParams) -> SamplingParams:
    """Absent fields take the defaults of SamplingParams. Does not validate."""
    values = {
        name: getattr(message, name) for name in _SCALARS if message.HasField(cast(Any, name))
    }
    return SamplingParams(
        logit_bias=dict(message.logit_bias),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        **values,
    )


def finish_to_proto(reason: FinishReason | None) -> inference_pb2.FinishReason.ValueType:
    return inference_pb2.FINISH_REASON_UNSPECIFIED if reason is None else _FINISH_TO_PROTO[reason]


def finish_from_proto(value: inference_pb2.FinishReason.ValueType) -> FinishReason | None:
    """None while the choice goes on."""
    return _FINISH_FROM_PROTO.get(value)


def codec_to_proto(codec: KvCodec) -> worker_pb2.KvCodec.ValueType:
    return _CODEC_TO_PROTO[codec]


def codec_from_proto(value: worker_pb2.KvCodec.ValueType) -> KvCodec:
    """Raises KeyError for a codec that this version does not know."""
    return _CODEC_FROM_PROTO[value]


def role_to_proto(role: WorkerRole) -> worker_pb2.WorkerRole.ValueType:
    return _ROLE_TO_PROTO[role]


def role_from_proto(value: worker_pb2.WorkerRole.ValueType) -> WorkerRole:
    """Raises KeyError for a role that this version does not know."""
    return _ROLE_FROM_PROTO[value]
