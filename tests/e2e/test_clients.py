"""Real clients against the real model: the README's examples as printed, many streams at once,
and clients that are killed."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from forebay_loadtest.report import summarise
from forebay_loadtest.streams import make_prompts, run_streams
from local_platform import LocalPlatform

pytestmark = pytest.mark.e2e

README = Path(__file__).parents[2] / "README.md"
EXAMPLE_LIMIT_S = 120
ENDLESS_CLIENT = """
import sys
from openai import OpenAI
client = OpenAI(base_url=sys.argv[1], api_key="none")
stream = client.chat.completions.create(
    model=sys.argv[2], stream=True, max_tokens=4000, logit_bias={"2": -100},
    messages=[{"role": "user", "content": "Count up from one, and never stop."}],
)
for chunk in stream:
    print(chunk.choices[0].delta.content, flush=True)
"""


def examples(language: str) -> list[str]:
    """The README's code blocks that talk to a platform, as they are printed."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)
    found = [block for block in blocks if "127.0.0.1:800" in block]
    assert found
    return found


def on_this_platform(example: str, platform: LocalPlatform) -> str:
    example = example.replace("127.0.0.1:8000", f"127.0.0.1:{platform.http_port}")
    return example.replace("127.0.0.1:8001", f"127.0.0.1:{platform.grpc_port}")


def run_example(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=EXAMPLE_LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("number", range(len(examples("python"))))
def test_python_examples(model_platform: LocalPlatform, number: int) -> None:
    code = on_this_platform(examples("python")[number], model_platform)
    assert "Paris" in run_example([sys.executable, "-c", code])


@pytest.mark.parametrize("number", [i for i, e in enumerate(examples("sh")) if "curl -s" in e])
def test_curl_examples(model_platform: LocalPlatform, number: int) -> None:
    command = on_this_platform(examples("sh")[number], model_platform)
    printed = run_example(["bash", "-c", command])
    assert '"choices":' in printed
    assert '"error"' not in printed
    assert ("Paris" in printed) == ("France" in command)
    assert ("data: [DONE]" in printed) == ('"stream": true' in command)


async def test_32_streams_at_once(model_platform: LocalPlatform) -> None:
    url = f"http://127.0.0.1:{model_platform.http_port}/v1"
    model = model_platform.status()["model"]
    before = model_platform.status()["totals"]
    results = await run_streams(url, model, make_prompts(32, seed=1), max_tokens=24, seed=1)
    figures = summarise(results, wall_s=1.0)
    assert figures["errors"] == []
    assert figures["num_complete"] == 32
    assert figures["usage_adds_up"]
    after = model_platform.status()["totals"]
    generated = after["generation_tokens"] - before["generation_tokens"]
    assert generated == sum(result.completion_tokens for result in results)
    prompts = after["prompt_tokens"] - before["prompt_tokens"]
    assert prompts == sum(result.prompt_tokens for result in results)


def test_a_killed_client_gives_every_block_back(model_platform: LocalPlatform) -> None:
    url = f"http://127.0.0.1:{model_platform.http_port}/v1"
    model = model_platform.status()["model"]
    command = [sys.executable, "-c", ENDLESS_CLIENT, url, model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        for _ in range(5):
            assert client.stdout.readline()
        assert sum(held(model_platform)) > 0
        client.send_signal(signal.SIGKILL)
    model_platform.wait_until(lambda: sum(held(model_platform)) == 0)
    assert model_platform.status()["totals"]["running"] == 0


def held(platform: LocalPlatform) -> list[int]:
    """Per worker, the blocks that are neither free nor cached."""
    blocks = [worker["kv_blocks"] for worker in platform.status()["workers"]]
    return [each["total"] - each["free"] - each["cached"] for each in blocks]
