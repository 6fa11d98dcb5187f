"""Requests of mixed kinds, and the answers they get when nothing goes wrong."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from functools import cache

from forebay.core.finish import FinishReason
from forebay.core.sampling import SamplingParams
from forebay.core.settings import EngineSettings
from forebay.engine.interface import Batch, SampledToken, ScheduledSequence
from forebay.engine.loader import load_runner
from forebay.gateway.generation import GenerationRequest, TokenPrompt
from forebay.simulator.dice import Dice
from forebay.text.detokenizer import IncrementalDetokenizer, StopWatcher
from forebay.text.spec import TokenizerSpec
from forebay.text.tokenizer import Tokenizer

MODEL = "sim"
NUM_KINDS = 96
MEAN_OUTPUT_TOKENS = 12
_ORACLE_ENGINE = EngineSettings(
    engine="sim",
    model_id=MODEL,
    num_blocks=64,
    block_size=16,
    sim_time_scale=0,
    sim_mean_output_tokens=MEAN_OUTPUT_TOKENS,
)
_KIND_SEED = 20_011
_LONGEST_PROMPT = 90


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """A prompt and how to sample after it; the same in every seed."""

    name: str
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int

    def request(self, seed: int, timeout_s: float) -> GenerationRequest:
        """`seed`: what a greedy request is known by; others need their own."""
        return GenerationRequest(
            model=MODEL,
            prompt=TokenPrompt(self.prompt),
            params=self.params,
            max_tokens=self.params.max_tokens,
            seed=seed if self.params.greedy else self.seed,
            timeout_s=timeout_s,
        )


@dataclass(frozen=True, slots=True)
class ExpectedChoice:
    tokens: tuple[SampledToken, ...]
    text: str
    reason: FinishReason


@cache
def kinds() -> tuple[Kind, ...]:
    dice = Dice(_KIND_SEED)
    prefixes = [_letters(dice, 16 + 8 * number) for number in range(5)]
    return tuple(_kind(dice, number, prefixes) for number in range(NUM_KINDS))


def _kind(dice: Dice, number: int, prefixes: list[tuple[int, ...]]) -> Kind:
    prompt = _letters(dice, 4 + dice.below(24))
    name = "plain"
    if dice.chance(0.5):
        prompt = dice.pick(prefixes) + prompt
        name = "shared"
    if dice.chance(0.15):
        prompt = _letters(dice, _LONGEST_PROMPT - dice.below(20))
        name = "long"
    params = SamplingParams(
        temperature=0.0 if dice.chance(0.5) else 0.8,
        max_tokens=3 + dice.below(12),
        ignore_eos=dice.chance(0.4),
    )
    match number % 8:
        case 0:
            name, params = f"{name} n", replace(params, n=2 + dice.below(2), temperature=0.8)
        case 1:
            name, params = f"{name} one token", replace(params, max_tokens=1)
        case 2:
            stops = tuple(chr(97 + dice.below(26)) for _ in range(2))
            name, params = f"{name} stop", replace(params, stop=stops, max_tokens=16)
        case 3:
            name, params = f"{name} logprobs", replace(params, top_logprobs=dice.below(3))
        case 4:
            params = replace(params, presence_penalty=0.5, repetition_penalty=1.1)
            name = f"{name} penalties"
    return Kind(name, prompt, params, seed=1000 + number)


def _letters(dice: Dice, count: int) -> tuple[int, ...]:
    return tuple(97 + dice.below(26) for _ in range(count))


@cache
def expected(kind: Kind) -> tuple[ExpectedChoice, ...]:
    """The answer of an engine that has nothing else to do, computed by the sim engine itself."""
    runner = load_runner(_ORACLE_ENGINE)
    tokenizer = Tokenizer(TokenizerSpec.from_bytes(runner.tokenizer_spec))
    params = replace(kind.params, seed=kind.seed)
    if not params.ignore_eos:
        params = replace(params, stop_token_ids=tuple(runner.model.eos_token_ids))
    blocks = list(range(runner.num_blocks))

    def next_token(tokens: list[int], start: int, choice: int) -> SampledToken:
        item = ScheduledSequence(
            tokens=tokens,
            num_prompt_tokens=len(kind.prompt),
            start=start,
            num_tokens=len(tokens) - start,
            block_table=blocks,
            params=params,
            choices=(choice,),
        )
        return _as_sent(runner.run(Batch((item,))).tokens[0][0])

    answers = []
    for choice in range(params.n):
        tokens, sampled = list(kind.prompt), [next_token(list(kind.prompt), 0, choice)]
        while _finish(params, sampled) is None:
            tokens.append(sampled[-1].token_id)
            sampled.append(next_token(tokens, len(tokens) - 1, choice))
        answers.append(_as_text(params, sampled, tokenizer))
    return tuple(answers)


def _finish(params: SamplingParams, sampled: list[SampledToken]) -> FinishReason | None:
    if sampled[-1].token_id in params.stop_token_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(sampled) == params.max_tokens else None


def _as_text(
    params: SamplingParams, sampled: list[SampledToken], tokenizer: Tokenizer
) -> ExpectedChoice:
    detokenizer, watcher = IncrementalDetokenizer(tokenizer), StopWatcher(params.stop)
    text = ""
    for count, token in enumerate(sampled, 1):
        if token.token_id in params.stop_token_ids:
            break
        piece, match = watcher.push(detokenizer.push(token.token_id))
        text += piece
        if match is not None:
            return ExpectedChoice(tuple(sampled[:count]), text, FinishReason.STOP)
    reason = _finish(params, sampled)
    assert reason is not None
    piece, match = watcher.push(detokenizer.finish())
    if match is not None:
        return ExpectedChoice(tuple(sampled), text + piece, FinishReason.STOP)
    return ExpectedChoice(tuple(sampled), text + piece + watcher.finish(), reason)


def _as_sent(token: SampledToken) -> SampledToken:
    """Log-probabilities travel as 32-bit floats."""
    if token.logprob is None:
        return token
    top = tuple((token_id, _float32(logprob)) for token_id, logprob in token.top)
    return SampledToken(token.token_id, _float32(token.logprob), top)


def _float32(value: float) -> float:
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded
