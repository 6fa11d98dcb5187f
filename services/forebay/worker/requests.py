"""A gateway's request as a worker accepts it."""

from __future__ import annotations

from dataclasses import dataclass, field

from forebay.core import clock
from forebay.core.clock import Deadline
from forebay.core.errors import DeadlineExceeded, InvalidRequest
from forebay.core.sampling import MAX_STOP_TOKEN_IDS, SamplingParams
from forebay.engine.sequence import RequestKey, SequenceStart
from forebay.kv.block_hash import HASH_BYTES
from forebay.rpc.conversions import sampling_from_proto
from forebay.rpc.v1 import worker_pb2


@dataclass(slots=True)
class WorkerRequest:
    """`going_on`: the choices without a finish yet. `since`: when the current phase began, on the
    loop's clock. `lease`: until when it lives unless renewed; the request table keeps it. `target`:
    where the KV goes once the prompt is computed, if elsewhere. `num_pulled_tokens`: leading ones
    whose KV was fetched from another worker for this request."""

    start: SequenceStart
    deadline: Deadline
    since: float
    lease: Deadline
    going_on: set[int] = field(default_factory=set)
    target: worker_pb2.TransferTarget | None = None
    first_token_sent: bool = False
    num_pulled_tokens: int = 0

    @property
    def key(self) -> RequestKey:
        return self.start.key

    @property
    def attempt(self) -> int:
        return self.start.attempt


def accept(
    spec: worker_pb2.SequenceSpec, model: worker_pb2.ModelInfo, lease_s: float
) -> WorkerRequest:
    """Its lease begins now. Raises InvalidRequest naming what a correct gateway would not have
    sent, or DeadlineExceeded."""
    if not spec.request_id or not spec.gateway_id:
        raise InvalidRequest("request_id and gateway_id are needed", param="request_id")
    if len(spec.cache_root) != HASH_BYTES:
        raise InvalidRequest(f"cache_root needs {HASH_BYTES} bytes", param="cache_root")
    _check_tokens(spec, model)
    if spec.timeout_ms == 0:
        raise DeadlineExceeded("the request's deadline has passed")
    params = sampling_from_proto(spec.sampling)
    params.validate(model.vocab_size, max_stop_token_ids=2 * MAX_STOP_TOKEN_IDS)
    choices = _choices(spec, params)
    deadline = Deadline.after_ms(spec.timeout_ms)
    start = SequenceStart(
        key=RequestKey(spec.gateway_id, spec.request_id),
        attempt=spec.attempt,
        tokens=(*spec.prompt_token_ids, *spec.generated_token_ids),
        num_prompt_tokens=len(spec.prompt_token_ids),
        params=params,
        choices=choices,
        cache_root=spec.cache_root,
    )
    return WorkerRequest(
        start=start,
        deadline=deadline,
        since=clock.now(),
        lease=deadline.within(lease_s),
        going_on=set(choices),
    )


def _check_tokens(spec: worker_pb2.SequenceSpec, model: worker_pb2.ModelInfo) -> None:
    longest = model.max_model_len - 1
    num_prompt, num_generated = len(spec.prompt_token_ids), len(spec.generated_token_ids)
    if not 1 <= num_prompt <= longest:
        raise InvalidRequest(
            f"a prompt of {num_prompt} tokens; 1 to {longest} fit", param="prompt_token_ids"
        )
    if num_prompt + num_generated > longest:
        raise InvalidRequest(
            f"{num_generated} generated tokens after a prompt of {num_prompt}; {longest} fit",
            param="generated_token_ids",
        )
    for param in ("prompt_token_ids", "generated_token_ids"):
        if max(getattr(spec, param), default=0) >= model.vocab_size:
            raise InvalidRequest("a token id is outside the vocabulary", param=param)


def _choices(spec: worker_pb2.SequenceSpec, params: SamplingParams) -> tuple[int, ...]:
    choices = tuple(sorted(spec.choices)) or tuple(range(params.n))
    if len(set(choices)) < len(choices) or choices[-1] >= params.n:
        raise InvalidRequest(f"choices are distinct and below n = {params.n}", param="choices")
    if spec.generated_token_ids and len(choices) > 1:
        raise InvalidRequest("generated tokens are of one choice", param="choices")
    if len(spec.generated_token_ids) >= params.max_tokens:
        raise InvalidRequest("max_tokens have been generated", param="generated_token_ids")
    return choices
