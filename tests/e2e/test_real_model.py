"""The whole platform with the real model: Ray, Valkey, gateway and two workers."""

from __future__ import annotations

import pytest

from local_platform import LocalPlatform

pytestmark = pytest.mark.e2e


def test_up_ends_with_the_platforms_own_answer(model_platform: LocalPlatform) -> None:
    lines = model_platform.up_output.splitlines()
    answer = next(line for line in lines if line.startswith("What is the capital of France?"))
    assert "Paris" in answer
    assert "nonsense" not in answer
    stages = ("Model file", "Redis", "Ray head", "Workers", "Gateway")
    assert all(any(line.startswith(stage) for line in lines) for stage in stages)
    assert any(line.endswith(f":{model_platform.http_port}/v1") for line in lines)


def test_kv_moved_between_the_pools(model_platform: LocalPlatform) -> None:
    assert model_platform.run("chat", "Say hello.", "--max-tokens", "8").returncode == 0
    (prefill,) = model_platform.workers("prefill")
    (decode,) = model_platform.workers("decode")
    assert prefill["kv_bytes_sent"] == decode["kv_bytes_received"] > 0
    assert decode["generation_tokens"] > prefill["generation_tokens"] > 0
    assert prefill["prompt_tokens"] > 0
    for worker in (prefill, decode):
        blocks = worker["kv_blocks"]
        held = sum(blocks[name] for name in ("cached", "used", "leased", "quarantined"))
        assert blocks["free"] + held == blocks["total"]


def test_http_and_grpc_give_the_same_greedy_answer(model_platform: LocalPlatform) -> None:
    question = "Name the largest planet."
    over_grpc = model_platform.run("chat", question, "--temperature", "0", "--max-tokens", "24")
    assert over_grpc.returncode == 0, over_grpc.stderr
    answer = model_platform.chat(question, temperature=0, max_tokens=24)
    assert answer["choices"][0]["message"]["content"].strip() == over_grpc.stdout.strip()
    assert over_grpc.stdout.strip()
