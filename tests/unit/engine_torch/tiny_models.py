"""Random tiny Llama checkpoints on disk, and a hand-driven stream of one sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from crc32c import crc32c
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from forebay.core.kv_codec import KvCodec
from forebay.core.sampling import SamplingParams
from forebay.engine.inputs import build_inputs
from forebay.engine.interface import Batch, KvSlice, Runner, SampledToken, ScheduledSequence
from forebay.engine.torch_runner import TorchRunner, load_torch_runner

VOCAB_SIZE = 97
GREEDY = SamplingParams(temperature=0.0)
ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def kv_part(
    runner: Runner,
    token_start: int,
    num_tokens: int,
    layer_start: int = 0,
    num_layers: int | None = None,
) -> KvSlice:
    """Of all heads, and by default of all layers."""
    layout = runner.kv_layout
    return KvSlice(
        layer_start=layer_start,
        num_layers=layout.num_layers if num_layers is None else num_layers,
        token_start=token_start,
        num_tokens=num_tokens,
        head_start=0,
        num_heads=layout.num_kv_heads,
    )


def read_kv(runner: Runner, table: list[int], part: KvSlice, codec: KvCodec = KvCodec.RAW) -> bytes:
    payload = bytearray(runner.kv_payload_bytes(part, codec))
    assert runner.export_kv(table, part, codec, memoryview(payload)) == crc32c(payload)
    return bytes(payload)


def write_kv(
    runner: Runner,
    table: list[int],
    part: KvSlice,
    payload: bytes,
    codec: KvCodec = KvCodec.RAW,
) -> None:
    runner.import_kv(table, part, codec, memoryview(payload), crc32c(payload))


def save_tiny_llama(folder: Path, *, shard_size: str = "1GB", **overrides: Any) -> LlamaForCausalLM:
    """Every parameter is random, biases and norms too, and large enough that logits differ."""
    torch.manual_seed(1234)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "attn_implementation": "eager",
    }
    model = LlamaForCausalLM(LlamaConfig(**settings | overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder, max_shard_size=shard_size)
    save_tokenizer(folder)
    return model


def save_tokenizer(folder: Path, size: int = VOCAB_SIZE) -> None:
    """One character a token; the end token is number 5."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())[:size]
    vocabulary = {char: i for i, char in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "&"}')


def load_tiny(path: Path, **overrides: Any) -> TorchRunner:
    settings: dict[str, Any] = {
        "model_id": "tiny",
        "dtype": "fp32",
        "num_blocks": 64,
        "kv_memory_bytes": 0,
        "block_size": 16,
        "max_model_len": None,
    }
    return load_torch_runner(path, **settings | overrides)


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (count,), generator=generator).tolist()


def shuffled_table(num_blocks: int, of: int, seed: int) -> list[int]:
    return torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:num_blocks].tolist()


def reference_logits(model: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def reference_greedy(model: LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(reference_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def step_logits(runner: TorchRunner, *sequences: ScheduledSequence) -> list[torch.Tensor]:
    """Raw logits of each sequence's last scheduled position, in order."""
    network = runner._network
    inputs = build_inputs(
        Batch(sequences), runner.kv_layout.block_size, network.dtype, network.device
    )
    with torch.inference_mode():
        logits = network.logits(network.forward(inputs, runner._kv.layers))
    rows = dict(zip(inputs.sampled, logits, strict=True))
    return [rows[i] for i in range(len(sequences))]


@dataclass
class Stream:
    """One sequence whose steps a test schedules by hand."""

    tokens: list[int]
    table: list[int]
    params: SamplingParams = GREEDY
    choice: int = 0
    start: int = 0
    num_prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.tokens)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    def next(self, max_tokens: int = 10_000) -> ScheduledSequence:
        count = min(max_tokens, len(self.tokens) - self.start)
        ends = self.start + count == len(self.tokens)
        scheduled = ScheduledSequence(
            tokens=list(self.tokens),
            num_prompt_tokens=self.num_prompt_tokens,
            start=self.start,
            num_tokens=count,
            block_table=self.table,
            params=self.params,
            choices=(self.choice,) if ends else (),
        )
        self.start += count
        return scheduled

    def take(self, sampled: tuple[SampledToken, ...]) -> None:
        self.tokens += [token.token_id for token in sampled]


def advance(runner: TorchRunner, *streams: Stream, steps: int = 1, chunk: int = 10_000) -> None:
    for _ in range(steps):
        result = runner.run(Batch(tuple(stream.next(chunk) for stream in streams)))
        for stream, sampled in zip(streams, result.tokens, strict=True):
            stream.take(sampled)
