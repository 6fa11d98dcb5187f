"""The same 20 prompts through two pools, through one mixed worker, and through transformers: fp32,
greedy, the default model, real gRPC between the workers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from forebay.core.randomness import Rng
from forebay.core.roles import WorkerRole
from forebay.core.sampling import SamplingParams
from forebay.core.settings import EngineSettings, GatewaySettings, WorkerSettings
from forebay.gateway.generation import ChatPrompt, Chunk, Completion, GenerationRequest
from forebay.gateway.service import GatewayService
from forebay.rpc.grpc_connector import GrpcConnector
from forebay.store.redis_kv_events import RedisKvEventSource
from forebay.store.redis_registry import RedisRegistry
from forebay.text.gguf_tokenizer import spec_from_gguf
from forebay.text.tokenizer import Tokenizer
from forebay.worker.process import WorkerProcess

NUM_PROMPTS = 20
NUM_TOKENS = 16
READY_S = 60.0
MODEL_ID = "default"


def mixed_length_prompts() -> list[ChatPrompt]:
    """From a few to about 400 tokens; many share a beginning, so that prefix caches are hit."""
    rng = random.Random(20)
    topics = ["rivers", "prime numbers", "the moon", "bread", "chess", "rain"]
    prompts = []
    for index in range(NUM_PROMPTS):
        notes = " ".join(f"Note {i}: {rng.choice(topics)}." for i in range(index * index // 6))
        question = f"{notes} Tell me something about {topics[index % len(topics)]}."
        prompts.append(ChatPrompt([{"role": "user", "content": question.strip()}]))
    return prompts


@asynccontextmanager
async def gateway_over(
    redis_url: str, model: Path, roles: tuple[WorkerRole, ...]
) -> AsyncIterator[GatewayService]:
    engine = EngineSettings(
        model_path=str(model), model_id=MODEL_ID, dtype="fp32", num_blocks=700, num_threads=1
    )
    workers = [
        WorkerProcess(WorkerSettings(role=role, redis_url=redis_url, engine=engine))
        for role in roles
    ]
    await asyncio.gather(*(worker.start() for worker in workers))
    settings = GatewaySettings(registry_poll_s=0.1)
    gateway = GatewayService(
        settings,
        GrpcConnector(),
        RedisRegistry.connect(redis_url),
        RedisKvEventSource.connect(redis_url),
        Rng(),
    )
    await gateway.start()
    try:
        async with asyncio.timeout(READY_S):
            while not gateway.ready:
                await asyncio.sleep(0.05)
        yield gateway
    finally:
        await gateway.stop()
        for worker in workers:
            await worker.stop(0)


async def answer(gateway: GatewayService, prompt: ChatPrompt) -> list[int]:
    request = GenerationRequest(
        model=MODEL_ID,
        prompt=prompt,
        params=SamplingParams(temperature=0.0, ignore_eos=True),
        max_tokens=NUM_TOKENS,
    )
    events = [event async for event in gateway.prepare(request).events()]
    assert isinstance(events[-1], Completion)
    chunks = (event for event in events if isinstance(event, Chunk))
    return [token.token_id for chunk in chunks for token in chunk.tokens]


async def answers(redis_url: str, model: Path, roles: tuple[WorkerRole, ...]) -> list[list[int]]:
    async with gateway_over(redis_url, model, roles) as gateway:
        prompts = mixed_length_prompts()
        return list(await asyncio.gather(*(answer(gateway, prompt) for prompt in prompts)))


def reference_choices(
    reference: LlamaForCausalLM, model: Path, answered: list[list[int]]
) -> list[list[int]]:
    """What transformers' model says at each place of the answers: the answers themselves if, and
    only if, it would have given them."""
    tokenizer = Tokenizer(spec_from_gguf(model))
    results = []
    for prompt, tokens in zip(mixed_length_prompts(), answered, strict=True):
        ids = tokenizer.encode_chat(prompt.messages)
        with torch.inference_mode():
            logits = reference(torch.tensor([ids + tokens[:-1]])).logits[0]
        results.append(logits[len(ids) - 1 :].argmax(dim=-1).tolist())
    return results


async def test_pools_and_mixed_worker_and_transformers_agree(
    valkey_url: str, default_model_path: Path, reference_model: LlamaForCausalLM
) -> None:
    pools = await answers(valkey_url, default_model_path, (WorkerRole.PREFILL, WorkerRole.DECODE))
    mixed = await answers(valkey_url, default_model_path, (WorkerRole.MIXED,))
    expected = await asyncio.to_thread(
        reference_choices, reference_model, default_model_path, pools
    )
    assert [len(tokens) for tokens in pools] == [NUM_TOKENS] * NUM_PROMPTS
    same = [p == m == e for p, m, e in zip(pools, mixed, expected, strict=True)]
    assert same == [True] * NUM_PROMPTS
