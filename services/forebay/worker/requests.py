"""A gateway's request as a worker accepts it."""

from __future__ import annotations

from dataclasses import dataclass, field

from forebay.core import clock
from forebay.core.clock import Deadline
from forebay.core.errors import DeadlineExceeded, InvalidRequest
from forebay.core.sampling import MAX_STOP_TOKEN_IDS, SamplingParams
from forebay.engine.sequence import RequestKey
from forebay.kv.block_hash import HASH_BYTES
from forebay.rpc.conversions import sampling_from_proto
from forebay.rpc.v1 import worker_pb2


@dataclass(slots=True)
class WorkerRequest:
    """`going_on`: the choices without a finish yet. `since`: when the current phase began, on the
    loop's clock. `target`: where the KV goes once the prompt is computed, if elsewhere."""

    key: RequestKey
    attempt: int
    prompt: list[int]
    params: SamplingParams
    cache_root: bytes
    deadline: Deadline
    since: float
    going_on: set[int] = field(default_factory=set)
    target: worker_pb2.TransferTarget | None = None
    first_token_sent: bool = False


def accept(spec: worker_pb2.SequenceSpec, model: worker_pb2.ModelInfo) -> WorkerRequest:
    """Raises InvalidRequest naming what a correct gateway would not have sent, or
    DeadlineExceeded."""
    if not spec.request_id or not spec.gateway_id:
        raise InvalidRequest("request_id and gateway_id are needed", param="request_id")
    if len(spec.cache_root) != HASH_BYTES:
        raise InvalidRequest(f"cache_root needs {HASH_BYTES} bytes", param="cache_root")
    prompt = list(spec.prompt_token_ids)
    if not 1 <= len(prompt) < model.max_model_len:
        raise InvalidRequest(
            f"a prompt of {len(prompt)} tokens; 1 to {model.max_model_len - 1} fit",
            param="prompt_token_ids",
        )
    if max(prompt) >= model.vocab_size:
        raise InvalidRequest("a token id is outside the vocabulary", param="prompt_token_ids")
    if spec.timeout_ms == 0:
        raise DeadlineExceeded("the request's deadline has passed")
    params = sampling_from_proto(spec.sampling)
    params.validate(model.vocab_size, max_stop_token_ids=2 * MAX_STOP_TOKEN_IDS)
    return WorkerRequest(
        key=RequestKey(spec.gateway_id, spec.request_id),
        attempt=spec.attempt,
        prompt=prompt,
        params=params,
        cache_root=spec.cache_root,
        deadline=Deadline.after_ms(spec.timeout_ms),
        since=clock.now(),
        going_on=set(range(params.n)),
    )
