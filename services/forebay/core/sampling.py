"""Sampling parameters after validation: what the client asked for with every default filled in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from forebay.core.errors import InvalidRequest

MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 300
MIN_TEMPERATURE = 0.01
"""Below this only the likeliest token has a chance, and dividing by it may overflow: greedy."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling is a pure function of these, the prompt, the tokens so far and the choice.

    temperature: 0 is greedy; values in (0, MIN_TEMPERATURE) count as greedy.
    top_k: 0 keeps the whole vocabulary. top_p, min_p: probabilities.
    seed: 64-bit key of the counter-based generator. The gateway picks one when the client does not.
    max_tokens: generated tokens per choice; the gateway always resolves it.
    n: number of choices. top_logprobs: None for no logprobs, else how many alternatives.
    stop: stop strings, watched for by the gateway; stop_token_ids: watched for by the worker.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    max_tokens: int = 16
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    def validate(self, vocab_size: int, *, max_stop_token_ids: int = MAX_STOP_TOKEN_IDS) -> None:
        """Raises InvalidRequest naming the first field that is out of range."""
        _check_range("temperature", self.temperature, 0.0, 2.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 10.0, low_open=True)
        _check_range("top_k", self.top_k, 0, 2**31 - 1)
        _check_range("n", self.n, 1, MAX_CHOICES)
        _check_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_range("seed", self.seed, -(2**63), 2**64 - 1)
        if self.top_logprobs is not None:
            _check_range("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        self._validate_stops(vocab_size, max_stop_token_ids)
        self._validate_logit_bias(vocab_size)

    def _validate_stops(self, vocab_size: int, max_stop_token_ids: int) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop: at most {MAX_STOP_STRINGS} strings", param="stop")
        for text in self.stop:
            if not text or len(text) > MAX_STOP_STRING_CHARS:
                raise InvalidRequest(
                    f"stop: each string needs 1 to {MAX_STOP_STRING_CHARS} characters", param="stop"
                )
        if len(self.stop_token_ids) > max_stop_token_ids:
            raise InvalidRequest(
                f"stop_token_ids: at most {max_stop_token_ids} ids", param="stop_token_ids"
            )
        for token_id in self.stop_token_ids:
            _check_range("stop_token_ids", token_id, 0, vocab_size - 1)

    def _validate_logit_bias(self, vocab_size: int) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(f"logit_bias: at most {MAX_LOGIT_BIAS} ids", param="logit_bias")
        for token_id, bias in self.logit_bias.items():
            _check_range("logit_bias", token_id, 0, vocab_size - 1)
            _check_range("logit_bias", bias, -100.0, 100.0)


def _check_range(
    name: str, value: float, low: float, high: float, *, low_open: bool = False
) -> None:
    """NaN and infinities fail like any other value outside [low, high] (or (low, high])."""
    inside = math.isfinite(value) and low <= value <= high and not (low_open and value == low)
    if not inside:
        bracket = "(" if low_open else "["
        raise InvalidRequest(f"{name}: {value} is not in {bracket}{low}, {high}]", param=name)
