"""`python -m forebay_loadtest.kv_codec_answers --model-path FILE`: what a lossy KV codec does to
answers.

Prompts are computed by one runner and their KV goes to another one, raw and through the codec; both
answer greedily. Raw is bit for bit what was computed, so its answers are the reference. `forced`
goes along the reference answer instead, token by token, and looks at what would have been said
next: there one early difference does not count again and again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from forebay.core.kv_codec import KvCodec
from forebay.core.sampling import SamplingParams
from forebay.core.settings import EngineSettings
from forebay.engine.interface import Batch, KvSlice, Runner, SampledToken, ScheduledSequence
from forebay.engine.loader import load_runner
from forebay.text.spec import TokenizerSpec
from forebay.text.tokenizer import Tokenizer
from forebay_loadtest.report import environment

CHUNK = 512
GREEDY = SamplingParams(temperature=0.0, top_logprobs=20)
QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Explain to a child why the sky is blue.",
    "Write a Python function that reverses a list, and explain it.",
    "Give me three reasons to learn to play chess.",
    "How do bees make honey?",
    "What is the difference between weather and climate?",
    "Write a short poem about a river in winter.",
    "A train leaves at 9:40 and arrives at 13:05. How long does it take?",
    "Translate 'good morning, my friend' into Spanish and French.",
    "List the planets of the solar system in order from the sun.",
)
NOTE = (
    "Note {number}: on day {day} the level of the reservoir was {level} cm and {count} gates were"
    " open; the keeper wrote that the water was {word}."
)
WORDS = ("calm", "muddy", "rising", "clear", "frozen", "falling", "green")


@dataclass(frozen=True, slots=True)
class Prompt:
    tokens: list[int]
    table: list[int]


@dataclass(frozen=True, slots=True)
class Comparison:
    """num_prompt_tokens; num_same: leading tokens of the answer that agree with the reference, of
    num_tokens. num_agreed: of the forced ones. differences: of the log probability of each
    reference token that is among the likeliest 20."""

    num_prompt_tokens: int
    num_tokens: int
    num_same: int
    num_agreed: int
    differences: list[float]


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """20: each question alone, and behind 4 to 40 notes that have nothing to do with it."""
    found = []
    for index, question in enumerate((*QUESTIONS, *QUESTIONS)):
        notes = [
            NOTE.format(
                number=i + 1,
                day=7 * i + index,
                level=(37 * i * i + 11 * index) % 900,
                count=(i + index) % 5,
                word=WORDS[(i * i + index) % len(WORDS)],
            )
            for i in range(4 * (index - len(QUESTIONS) + 1))
        ]
        content = "\n".join([*notes, question])
        found.append(tokenizer.encode_chat([{"role": "user", "content": content}]))
    return found


class Answerer:
    """Goes on from a prompt's KV in the blocks of `table`."""

    def __init__(self, runner: Runner, prompt: Prompt) -> None:
        self._runner = runner
        self._prompt = prompt

    def compute(self) -> SampledToken:
        """The prompt, and the first token."""
        tokens = self._prompt.tokens
        for start in range(0, len(tokens), CHUNK):
            sampled = self._step(tokens, start, min(CHUNK, len(tokens) - start))
        assert sampled is not None
        return sampled

    def answer(self, first: int, num_tokens: int) -> list[SampledToken]:
        """`num_tokens` after the first one, each the likeliest."""
        tokens, said = [*self._prompt.tokens, first], []
        for _ in range(num_tokens):
            said.append(self._next(tokens))
            tokens.append(said[-1].token_id)
        return said

    def forced(self, first: int, along: Seq[int]) -> list[SampledToken]:
        """What would come next after each token of `along`, which follows in any case."""
        tokens, said = [*self._prompt.tokens, first], []
        for token_id in along:
            said.append(self._next(tokens))
            tokens.append(token_id)
        return said

    def _next(self, tokens: list[int]) -> SampledToken:
        sampled = self._step(tokens, len(tokens) - 1, 1)
        assert sampled is not None
        return sampled

    def _step(self, tokens: list[int], start: int, num_tokens: int) -> SampledToken | None:
        choices = (0,) if start + num_tokens == len(tokens) else ()
        item = ScheduledSequence(
            tokens=tokens,
            num_prompt_tokens=len(self._prompt.tokens),
            start=start,
            num_tokens=num_tokens,
            block_table=self._prompt.table,
            params=GREEDY,
            choices=choices,
        )
        (sampled,) = self._runner.run(Batch((item,))).tokens
        return sampled[0] if sampled else None


def move(source: Runner, target: Runner, prompt: Prompt, codec: KvCodec) -> None:
    layout = source.kv_layout
    part = KvSlice(0, layout.num_layers, 0, len(prompt.tokens), 0, layout.num_kv_heads)
    payload = memoryview(bytearray(source.kv_payload_bytes(part, codec)))
    checksum = source.export_kv(prompt.table, part, codec, payload)
    target.import_kv(prompt.table, part, codec, payload, checksum)


def compare(source: Runner, target: Runner, tokens: list[int], num_tokens: int) -> Comparison:
    block_size = source.kv_layout.block_size
    prompt = Prompt(tokens, list(range(-(-(len(tokens) + num_tokens + 1) // block_size))))
    here, there = Answerer(source, prompt), Answerer(target, prompt)
    first = here.compute().token_id
    move(source, target, prompt, KvCodec.RAW)
    reference = there.answer(first, num_tokens)
    ids = [token.token_id for token in reference]
    move(source, target, prompt, KvCodec.FP8)
    free = [token.token_id for token in there.answer(first, num_tokens)]
    move(source, target, prompt, KvCodec.FP8)
    forced = there.forced(first, ids)
    differences = [
        abs(dict(guess.top)[said.token_id] - said.logprob)
        for said, guess in zip(reference, forced, strict=True)
        if said.logprob is not None and said.token_id in dict(guess.top)
    ]
    same = [a == b for a, b in zip(ids, free, strict=True)]
    return Comparison(
        num_prompt_tokens=len(tokens),
        num_tokens=num_tokens,
        num_same=same.index(False) if False in same else num_tokens,
        num_agreed=sum(a == b.token_id for a, b in zip(ids, forced, strict=True)),
        differences=differences,
    )


def summarise(rows: list[Comparison]) -> dict[str, Any]:
    differences = sorted(difference for row in rows for difference in row.differences)
    num_tokens = sum(row.num_tokens for row in rows)
    return {
        "prompts": len(rows),
        "prompt_tokens": [row.num_prompt_tokens for row in rows],
        "answer_tokens": rows[0].num_tokens,
        "same_answers": sum(row.num_same == row.num_tokens for row in rows),
        "same_tokens_before_the_first_difference": statistics.median(row.num_same for row in rows),
        "forced_agreement": round(sum(row.num_agreed for row in rows) / num_tokens, 4),
        "logprob_difference_median": round(statistics.median(differences), 4),
        "logprob_difference_p99": round(differences[int(0.99 * len(differences))], 4),
    }


@click.command()
@click.option("--model-path", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--dtype", "dtypes", multiple=True, default=("bf16", "fp32"), show_default=True)
@click.option("--tokens", default=64, show_default=True, help="Of each answer.")
@click.option("--threads", default=1, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Where the JSON goes too.")
def main(
    model_path: Path, dtypes: tuple[str, ...], tokens: int, threads: int, output: Path | None
) -> None:
    """The fp8 codec against raw, in words of the answers."""
    results = {}
    for dtype in dtypes:
        settings = EngineSettings(
            model_path=str(model_path), dtype=dtype, num_blocks=256, num_threads=threads
        )
        source, target = load_runner(settings), load_runner(settings)
        tokenizer = Tokenizer(TokenizerSpec.from_bytes(source.tokenizer_spec))
        rows = [compare(source, target, prompt, tokens) for prompt in prompts(tokenizer)]
        results[dtype] = summarise(rows)
        figures = results[dtype]
        click.echo(
            f"{dtype}: {figures['same_answers']} of {len(rows)} answers of {tokens} tokens are the"
            f" same; median of {figures['same_tokens_before_the_first_difference']:.0f} tokens"
            f" before the first difference; {100 * figures['forced_agreement']:.1f} % of tokens"
            f" agree when the text so far does; log probabilities differ by"
            f" {figures['logprob_difference_median']} (median), "
            f"{figures['logprob_difference_p99']} (p99)"
        )
    report = {**environment(), "model": model_path.name, "codec": "fp8", "results": results}
    click.echo(json.dumps(report))
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
