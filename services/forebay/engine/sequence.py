"""The engine's state of one request's tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from forebay.core.finish import FinishReason
from forebay.core.sampling import SamplingParams
from forebay.engine.interface import SampledToken
from forebay.kv.block_hash import HashChain


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    HOLDING = auto()
    """KV for another worker, computed or found here; blocks stay until it has been sent."""
    FINISHED = auto()


@dataclass(frozen=True, slots=True)
class RequestKey:
    """Gateways choose request ids, so two gateways may choose the same."""

    gateway_id: str
    request_id: str


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """What a worker is asked to compute and to go on with.

    tokens: the prompt and, where an answer is resumed, what its one choice has generated before:
    computed, sent, held and cached alike. choices: those wanted, ascending. cache_root: root of
    the chain of block hashes.
    """

    key: RequestKey
    attempt: int
    tokens: tuple[int, ...]
    num_prompt_tokens: int
    params: SamplingParams
    choices: tuple[int, ...]
    cache_root: bytes


@dataclass(slots=True, eq=False)
class Sequence:
    """tokens: prompt, then generated. num_start_tokens: how many of them were given and not sampled
    here. num_computed_tokens: leading tokens whose KV lies in block_table. choices: choices sampled
    when the end of `tokens` is reached; a prompt with n choices is one sequence until its first
    tokens, then n.

    num_found_tokens: leading tokens whose KV was in the prefix cache when the sequence came.
    arrival: orders the queue; the engine gives it. prefill_only: the KV goes to another worker.
    aborted: ended while a step computes it; its blocks are released after the step.
    """

    key: RequestKey
    attempt: int
    tokens: list[int]
    num_prompt_tokens: int
    num_start_tokens: int
    params: SamplingParams
    chain: HashChain
    choices: tuple[int, ...]
    prefill_only: bool = False
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_found_tokens: int = 0
    status: Status = Status.WAITING
    arrival: int = -1
    aborted: bool = False

    @classmethod
    def begin(cls, start: SequenceStart, block_size: int) -> Sequence:
        """A waiting sequence that stands for all of its choices."""
        return cls(
            key=start.key,
            attempt=start.attempt,
            tokens=list(start.tokens),
            num_prompt_tokens=start.num_prompt_tokens,
            num_start_tokens=len(start.tokens),
            params=start.params,
            chain=HashChain(start.cache_root, block_size),
            choices=start.choices,
        )

    @property
    def has_sampled(self) -> bool:
        """Whether a token has been sampled here."""
        return len(self.tokens) > self.num_start_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.tokens) - self.num_computed_tokens

    @property
    def num_generated_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    def fork(self, choice: int) -> Sequence:
        """A sequence of the same tokens for `choice`, over the same blocks (the caller holds them
        once more)."""
        return Sequence(
            key=self.key,
            attempt=self.attempt,
            tokens=list(self.tokens),
            num_prompt_tokens=self.num_prompt_tokens,
            num_start_tokens=self.num_start_tokens,
            params=self.params,
            chain=self.chain.copy(),
            choices=(choice,),
            block_table=list(self.block_table),
            num_computed_tokens=self.num_computed_tokens,
            num_cached_tokens=self.num_cached_tokens,
            status=self.status,
        )


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One sampled token. offset: its index among the choice's generated tokens. num_cached_tokens:
    of the tokens given, how many were in the prefix cache; None but with a choice's first token
    here."""

    key: RequestKey
    attempt: int
    choice: int
    offset: int
    token: SampledToken
    finish: FinishReason | None
    num_cached_tokens: int | None


def finish_reason(
    params: SamplingParams, token_id: int, num_generated: int, num_tokens: int, max_model_len: int
) -> FinishReason | None:
    """Whether a choice ends with `token_id`, its `num_generated`-th token; `num_tokens` counts
    the prompt too."""
    if token_id in params.stop_token_ids:
        return FinishReason.STOP
    if num_generated >= params.max_tokens or num_tokens >= max_model_len:
        return FinishReason.LENGTH
    return None
