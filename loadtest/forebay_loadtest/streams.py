"""Concurrent chat streams through the openai client, each checked to be complete."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

from openai import AsyncOpenAI, OpenAIError

_WORDS = [
    "river",
    "dam",
    "turbine",
    "water",
    "gate",
    "sluice",
    "spring",
    "flood",
    "basin",
    "channel",
    "stone",
    "mill",
]


@dataclass(frozen=True, slots=True)
class StreamResult:
    """What one stream gave. Times in seconds; num_chunks counts those with text. error is empty
    for a stream that ended with a finish reason, usage and [DONE]."""

    ttft_s: float
    total_s: float
    num_chunks: int
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    finish_reason: str
    error: str


def make_prompts(count: int, seed: int) -> list[str]:
    """Questions of 1 to 120 words; the same for the same seed."""
    rng = random.Random(seed)
    return [
        "Write about " + " ".join(rng.choices(_WORDS, k=rng.randint(1, 120))) for _ in range(count)
    ]


async def run_streams(
    url: str, model: str, prompts: list[str], max_tokens: int, seed: int
) -> list[StreamResult]:
    """All prompts at once. `url`: the base URL, with /v1."""
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        return list(
            await asyncio.gather(
                *(
                    _run(client, model, prompt, max_tokens, seed + index)
                    for index, prompt in enumerate(prompts)
                )
            )
        )


async def _run(
    client: AsyncOpenAI, model: str, prompt: str, max_tokens: int, seed: int
) -> StreamResult:
    began = time.monotonic()
    first = 0.0
    num_chunks = 0
    finish = ""
    counts = (0, 0, 0)
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=max_tokens,
            seed=seed,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            if chunk.usage is not None:
                usage = chunk.usage
                counts = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
            for choice in chunk.choices:
                if choice.delta.content:
                    first = first or time.monotonic() - began
                    num_chunks += 1
                finish = choice.finish_reason or finish
        error = "" if finish and counts[2] else "the stream ended without finish reason or usage"
    except OpenAIError as failure:
        error = f"{type(failure).__name__}: {failure}"
    total_s = time.monotonic() - began
    return StreamResult(first, total_s, num_chunks, *counts, finish, error)
