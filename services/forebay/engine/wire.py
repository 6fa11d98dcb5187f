"""The engine's outputs and figures as they travel to gateways."""

from __future__ import annotations

from forebay.core.finish import FinishReason
from forebay.engine.engine import Engine
from forebay.engine.interface import SampledToken
from forebay.engine.sequence import SequenceStart, TokenOutput
from forebay.rpc.conversions import finish_to_proto
from forebay.rpc.v1 import inference_pb2, worker_pb2


def output_to_proto(output: TokenOutput, num_pulled_tokens: int = 0) -> worker_pb2.SequenceOutput:
    """`num_pulled_tokens`: of the prompt's beginning, fetched from another worker; some of them
    may have been evicted again."""
    token = output.token
    message = worker_pb2.SequenceOutput(
        request_id=output.key.request_id,
        attempt=output.attempt,
        choice=output.choice,
        offset=output.offset,
        token_ids=(token.token_id,),
        finish_reason=finish_to_proto(output.finish),
    )
    if output.num_cached_tokens is not None:
        message.num_cached_tokens = output.num_cached_tokens
        message.num_pulled_tokens = min(num_pulled_tokens, output.num_cached_tokens)
    if token.logprob is not None:
        message.logprobs.append(
            inference_pb2.TokenLogprob(
                token_id=token.token_id,
                logprob=token.logprob,
                top=[inference_pb2.TokenLogprob(token_id=i, logprob=p) for i, p in token.top],
            )
        )
    return message


def error_to_proto(
    start: SequenceStart, choice: int, message: str, *, resumable: bool
) -> worker_pb2.SequenceOutput:
    """`resumable`: the choice may go on elsewhere from the tokens sent so far."""
    return worker_pb2.SequenceOutput(
        request_id=start.key.request_id,
        attempt=start.attempt,
        choice=choice,
        finish_reason=finish_to_proto(FinishReason.ERROR),
        error=message,
        resumable=resumable,
    )


def tokens_from_proto(output: worker_pb2.SequenceOutput) -> list[SampledToken]:
    if not output.logprobs:
        return [SampledToken(token_id) for token_id in output.token_ids]
    return [
        SampledToken(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top=tuple((top.token_id, top.logprob) for top in entry.top),
        )
        for entry in output.logprobs
    ]


def load_of(engine: Engine) -> worker_pb2.WorkerLoad:
    """The engine's share; how much waits and how much more may come is the worker's to say."""
    counts = engine.pool.counts()
    return worker_pb2.WorkerLoad(
        num_running=engine.num_running,
        num_waiting=engine.num_waiting,
        kv_event_seq=0 if engine.pool.journal is None else engine.pool.journal.seq,
        kv_blocks=worker_pb2.KvBlocks(
            total=counts.total,
            free=counts.free,
            cached=counts.cached,
            used=counts.used,
            leased=counts.leased,
            quarantined=counts.quarantined,
        ),
    )


def counters_of(engine: Engine) -> worker_pb2.WorkerCounters:
    """The engine's share; transfers and leases are the worker's to add."""
    counters = engine.counters
    return worker_pb2.WorkerCounters(
        prompt_tokens=counters.prompt_tokens,
        generation_tokens=counters.generation_tokens,
        prefix_cache_queries=counters.prefix_cache_queries,
        prefix_cache_hits=counters.prefix_cache_hits,
        preemptions=engine.num_preemptions,
    )
