"""The default model, from its GGUF file, against transformers' own loader and classes in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from forebay.core.sampling import SamplingParams
from forebay.engine.inputs import build_inputs
from forebay.engine.interface import Batch, ScheduledSequence
from forebay.engine.torch_runner import TorchRunner, load_torch_runner
from forebay.text.spec import TokenizerSpec
from forebay.text.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0.0)
NUM_TOKENS = 24
PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about a river in spring.",
    "def fibonacci(n):",
    "Explain in two sentences why the sky is blue, and why it turns red in the evening.",
]


def load(path: Path, dtype: str) -> TorchRunner:
    return load_torch_runner(
        path,
        model_id="default",
        dtype=dtype,
        num_blocks=128,
        kv_memory_bytes=0,
        block_size=16,
        max_model_len=None,
    )


@pytest.fixture(scope="module")
def runner(default_model_path: Path) -> TorchRunner:
    return load(default_model_path, "fp32")


@pytest.fixture(scope="module")
def prompts(runner: TorchRunner) -> list[list[int]]:
    tokenizer = Tokenizer(TokenizerSpec.from_bytes(runner.tokenizer_spec))
    return [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in PROMPTS]


def table(i: int) -> list[int]:
    """Blocks of the i-th prompt, far apart and out of order."""
    return [(7 * block + 32 * i) % 32 + 32 * i for block in range(16)]


def logits_of(runner: TorchRunner, sequence: ScheduledSequence) -> torch.Tensor:
    network = runner._network
    inputs = build_inputs(Batch((sequence,)), 16, network.dtype, network.device)
    with torch.inference_mode():
        logits: torch.Tensor = network.logits(network.forward(inputs, runner._kv.layers))[0]
    return logits


def test_logits(
    runner: TorchRunner, reference_model: LlamaForCausalLM, prompts: list[list[int]]
) -> None:
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            expected = reference_model(torch.tensor([prompt])).logits[0, -1]
        sequence = ScheduledSequence(prompt, len(prompt), 0, len(prompt), table(i), GREEDY, (0,))
        torch.testing.assert_close(logits_of(runner, sequence), expected, rtol=0, atol=5e-4)


def test_greedy_batch(
    runner: TorchRunner, reference_model: LlamaForCausalLM, prompts: list[list[int]]
) -> None:
    streams = [list(prompt) for prompt in prompts]
    starts = [0] * len(streams)
    while len(streams[0]) < len(prompts[0]) + NUM_TOKENS:
        batch = Batch(
            tuple(
                ScheduledSequence(
                    list(tokens), len(prompt), start, len(tokens) - start, table(i), GREEDY, (0,)
                )
                for i, (tokens, prompt, start) in enumerate(
                    zip(streams, prompts, starts, strict=True)
                )
            )
        )
        starts = [len(tokens) for tokens in streams]
        for tokens, (sampled,) in zip(streams, runner.run(batch).tokens, strict=True):
            tokens.append(sampled.token_id)
    for tokens, prompt in zip(streams, prompts, strict=True):
        with torch.no_grad():
            logits = reference_model(torch.tensor([tokens[:-1]])).logits[0]
        assert tokens[len(prompt) :] == logits[len(prompt) - 1 :].argmax(dim=-1).tolist()


def test_bf16_stays_close(
    default_model_path: Path, reference_model: LlamaForCausalLM, prompts: list[list[int]]
) -> None:
    """The same most probable token wherever fp32 has a clear one."""
    runner = load(default_model_path, "bf16")
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            expected = reference_model(torch.tensor([prompt])).logits[0, -1]
        sequence = ScheduledSequence(prompt, len(prompt), 0, len(prompt), table(i), GREEDY, (0,))
        best = expected.topk(2)
        logits = logits_of(runner, sequence)
        assert (logits - expected).abs().max() < 1.0
        if best.values[0] - best.values[1] > 1.0:
            assert logits.argmax() == best.indices[0]


def test_the_model_is_the_file(runner: TorchRunner) -> None:
    model = runner.model
    assert model.revision == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert (model.vocab_size, model.max_model_len) == (49152, 2048)
    assert list(model.eos_token_ids) == [2]
