from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    GREEDY,
    ROPE_LLAMA3,
    VOCAB_SIZE,
    Stream,
    advance,
    kv_part,
    load_tiny,
    random_tokens,
    read_kv,
    reference_greedy,
    reference_logits,
    save_tiny_llama,
    save_tokenizer,
    shuffled_table,
    step_logits,
    write_kv,
)
from transformers import LlamaForCausalLM

from forebay.core.errors import (
    ConfigurationError,
    InternalError,
    KvTransferError,
    ModelFileError,
)
from forebay.core.sampling import SamplingParams
from forebay.engine.interface import Batch, ScheduledSequence, StepResult
from forebay.rpc.v1 import worker_pb2
from forebay.text.spec import TokenizerSpec

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3-rope": {"rope_parameters": ROPE_LLAMA3},
    "linear-rope": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    },
    "tied": {"tie_word_embeddings": True},
    "head-dim": {"head_dim": 24},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny-llama")


@pytest.fixture(scope="module", autouse=True)
def model(folder: Path) -> LlamaForCausalLM:
    """The reference; its checkpoint lies in `folder`."""
    return save_tiny_llama(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path, **VARIANTS[variant])
    runner = load_tiny(tmp_path, block_size=4)
    tokens = random_tokens(61, seed=7)
    expected = reference_logits(model, tokens)
    stream = Stream(tokens[:50], shuffled_table(16, of=64, seed=3))
    for end in range(50, 61):
        stream.tokens = tokens[:end]
        (logits,) = step_logits(runner, stream.next())
        torch.testing.assert_close(logits, expected[end - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 1000])
def test_chunked_prefill_then_decode_is_greedy_transformers(
    folder: Path, model: LlamaForCausalLM, block_size: int, chunk: int
) -> None:
    runner = load_tiny(folder, block_size=block_size, num_blocks=100)
    prompt = random_tokens(37, seed=11)
    stream = Stream(list(prompt), shuffled_table(-(-60 // block_size), of=100, seed=5))
    while len(stream.generated) < 12:
        advance(runner, stream, chunk=chunk)
    assert stream.generated == reference_greedy(model, prompt, 12)


def test_mixed_lengths_decode_together_with_a_prefill(
    folder: Path, model: LlamaForCausalLM
) -> None:
    runner = load_tiny(folder, block_size=4, num_blocks=256)
    table = shuffled_table(250, of=256, seed=9)
    lengths = [1, 2, 5, 16, 33, 350]
    starts = [0, 10, 20, 30, 45, 60]
    streams = [
        Stream(random_tokens(length, seed=length), table[at : at + 100])
        for at, length in zip(starts, lengths, strict=True)
    ]
    prompts = [list(stream.tokens) for stream in streams]
    late = Stream(random_tokens(29, seed=99), table[200:220])
    late_prompt = list(late.tokens)
    advance(runner, *streams, steps=3)
    while not late.generated:
        advance(runner, *streams[:3], late, *streams[3:], chunk=10)
    advance(runner, late, *streams, steps=4)
    for stream, prompt in [*zip(streams, prompts, strict=True), (late, late_prompt)]:
        expected = reference_greedy(model, prompt, len(stream.generated))
        assert stream.generated == expected


def test_a_preempted_stream_recomputed_from_its_tokens_goes_on_the_same(folder: Path) -> None:
    runner = load_tiny(folder)
    whole = Stream(random_tokens(20, seed=1), [5, 9, 3])
    advance(runner, whole, steps=12)
    resumed = Stream(whole.tokens[:26], [40, 2, 11])
    resumed.num_prompt_tokens = 20
    advance(runner, resumed, steps=6)
    assert resumed.tokens == whole.tokens


def test_sampled_choices_fork_with_block_copies(folder: Path) -> None:
    runner = load_tiny(folder, block_size=8)
    params = SamplingParams(temperature=1.0, seed=77, n=2, top_p=0.95)
    prompt = random_tokens(21, seed=2)
    first = Stream(list(prompt), [4, 7, 1, 20], params)
    scheduled = dataclasses.replace(first.next(), choices=(0, 1))
    (tokens,) = runner.run(Batch((scheduled,))).tokens
    second = Stream(list(prompt), [4, 7, 30, 31], params, choice=1, start=21)
    first.take(tokens[:1])
    second.take(tokens[1:])
    result = runner.run(Batch((first.next(), second.next()), block_copies=((1, 30),)))
    first.take(result.tokens[0])
    second.take(result.tokens[1])
    advance(runner, first, second, steps=8)
    for choice, stream in enumerate((first, second)):
        alone = Stream(list(prompt), [50, 51, 52, 53], params, choice)
        advance(runner, alone, steps=10)
        assert alone.tokens == stream.tokens
    assert first.generated != second.generated


def test_block_copies_read_every_source_before_they_write(folder: Path) -> None:
    runner = load_tiny(folder)
    advance(runner, Stream(random_tokens(32, seed=3), [1, 2]))
    part = kv_part(runner, 0, 16)
    before = [read_kv(runner, [block], part) for block in (1, 2)]
    assert runner.run(Batch((), block_copies=((1, 2), (2, 3)))) == StepResult(())
    assert [read_kv(runner, [block], part) for block in (2, 3)] == before


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_imported_kv_continues_bit_for_bit(folder: Path, dtype: str) -> None:
    source = load_tiny(folder, dtype=dtype)
    target = load_tiny(folder, dtype=dtype)
    prompt = random_tokens(45, seed=8)
    sent = Stream(list(prompt), shuffled_table(5, of=64, seed=1))
    advance(source, sent)
    received = Stream(list(sent.tokens), shuffled_table(5, of=64, seed=2), start=45)
    received.num_prompt_tokens = 45
    per_token = source.kv_layout.bytes_per_token_layer
    for layer_start, num_layers in ((0, 2), (2, 1)):
        for token_start, num_tokens in ((30, 15), (0, 1), (1, 29)):
            part = kv_part(source, token_start, num_tokens, layer_start, num_layers)
            payload = read_kv(source, sent.table, part)
            assert len(payload) == per_token * num_tokens * num_layers
            write_kv(target, received.table, part, payload)
    for _ in range(10):
        here, there = sent.next(), received.next()
        assert torch.equal(step_logits(source, here)[0], step_logits(target, there)[0])
        sent.take(source.run(Batch((here,))).tokens[0])
        received.take(target.run(Batch((there,))).tokens[0])
    assert sent.tokens == received.tokens


def test_kv_payload_order_is_layers_kv_tokens_heads_dim(folder: Path) -> None:
    runner = load_tiny(folder, block_size=4)
    table = [3, 9, 1, 6]
    advance(runner, Stream(random_tokens(14, seed=4), table))
    payload = bytearray(read_kv(runner, table, kv_part(runner, 3, 7, 1, 2)))
    values = torch.frombuffer(payload, dtype=torch.float32).view(2, 2, 7, 2, 8)
    for layer in range(2):
        for kind in range(2):
            for token in range(7):
                block, offset = table[(3 + token) // 4], (3 + token) % 4
                stored = runner._kv.cache[1 + layer, kind, block, offset]
                assert torch.equal(values[layer, kind, token], stored)
    assert values.abs().min() > 0


def test_import_touches_nothing_but_its_range(folder: Path) -> None:
    runner = load_tiny(folder, block_size=4)
    advance(runner, Stream(random_tokens(16, seed=4), [3, 9, 1, 6]))
    before = runner._kv.cache.clone()
    payload = bytes(2 * 3 * runner.kv_layout.bytes_per_token_layer)
    write_kv(runner, [3, 9, 1, 6], kv_part(runner, 6, 3, 1, 2), payload)
    changed = (runner._kv.cache != before).flatten(4).any(-1)
    expected = torch.zeros_like(changed)
    expected[1:, :, 9, 2:] = True
    expected[1:, :, 1, 0] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("missing", [-1, 1])
def test_a_kv_payload_of_another_length_is_refused(folder: Path, missing: int) -> None:
    runner = load_tiny(folder)
    before = runner._kv.cache.clone()
    payload = bytes(5 * 3 * runner.kv_layout.bytes_per_token_layer - missing)
    with pytest.raises(KvTransferError, match="bytes"):
        write_kv(runner, [0], kv_part(runner, 0, 5), payload)
    assert torch.equal(runner._kv.cache, before)


def test_not_finite_logits_are_an_error_not_a_token(folder: Path) -> None:
    runner = load_tiny(folder)
    stream = Stream(random_tokens(5, seed=1), [0])
    runner._network._norm[0] = float("nan")
    with pytest.raises(InternalError, match="not finite"):
        runner.run(Batch((stream.next(),)))


def test_a_chunk_that_does_not_reach_the_end_samples_nothing(folder: Path) -> None:
    runner = load_tiny(folder)
    stream = Stream(random_tokens(20, seed=1), [0, 1])
    assert runner.run(Batch((stream.next(8),))).tokens == ((),)


def test_the_model_says_what_it_is(folder: Path) -> None:
    runner = load_tiny(folder, num_blocks=10, block_size=16)
    model, layout = runner.model, runner.kv_layout
    spec = TokenizerSpec.from_bytes(runner.tokenizer_spec)
    assert (model.id, model.engine, model.vocab_size) == ("tiny", "torch", VOCAB_SIZE)
    assert (model.tokenizer_hash, len(model.revision)) == (spec.hash, 64)
    assert list(model.eos_token_ids) == [2, 5]
    assert (model.max_model_len, runner.num_blocks) == (160, 10)
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim) == (3, 2, 8)
    assert (layout.dtype, layout.block_size) == (worker_pb2.KV_DTYPE_FP32, 16)
    assert layout.bytes_per_token_layer == 2 * 2 * 8 * 4


@pytest.mark.parametrize(
    ("limit", "num_blocks", "expected"), [(None, 64, 512), (100, 64, 100), (900, 64, 512)]
)
def test_max_model_len_is_the_smallest_limit(
    folder: Path, limit: int | None, num_blocks: int, expected: int
) -> None:
    runner = load_tiny(folder, max_model_len=limit, num_blocks=num_blocks)
    assert runner.model.max_model_len == expected


def test_kv_memory_decides_the_number_of_blocks(folder: Path) -> None:
    block_bytes = 3 * 2 * 2 * 8 * 4 * 16
    runner = load_tiny(folder, num_blocks=None, kv_memory_bytes=7 * block_bytes + 5)
    assert runner.num_blocks == 7
    halved = load_tiny(folder, num_blocks=None, kv_memory_bytes=7 * block_bytes, dtype="bf16")
    assert halved.num_blocks == 14


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"device": "abacus"}, "device"),
        ({"block_size": 0}, "block_size"),
        ({"num_blocks": 0}, "no room for KV"),
        ({"num_blocks": None, "kv_memory_bytes": 100}, "no room for KV"),
        ({"num_blocks": 2**46}, "bytes for KV are more than"),
    ],
)
def test_settings_that_cannot_work(folder: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_tiny(folder, **overrides)


def test_auto_dtype_is_a_real_one(folder: Path) -> None:
    dtype = load_tiny(folder, dtype="auto").kv_layout.dtype
    assert dtype in (worker_pb2.KV_DTYPE_FP32, worker_pb2.KV_DTYPE_BF16)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    save_tokenizer(tmp_path, size=VOCAB_SIZE + 1)
    with pytest.raises(ModelFileError, match="98"):
        load_tiny(tmp_path)


def test_num_threads_is_torchs_own(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        load_tiny(folder, num_threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_same_batch_gives_the_same_tokens_twice(folder: Path) -> None:
    runner = load_tiny(folder)
    params = dataclasses.replace(GREEDY, temperature=1.3, seed=5)
    runs = []
    for table in ([0, 1, 2], [9, 8, 7]):
        stream = Stream(random_tokens(10, seed=6), table, params)
        advance(runner, stream, steps=20)
        runs.append(stream.generated)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 5


@pytest.mark.parametrize("chunk", [5, 16, 1000])
def test_a_layers_kv_is_whole_when_its_hook_is_called(folder: Path, chunk: int) -> None:
    """Read in the hook, it is what lies there in the end, and the answer stays the same."""
    tokens = random_tokens(40, seed=9)
    table = shuffled_table(10, of=64, seed=3)
    plain, hooked = (load_tiny(folder, block_size=4) for _ in range(2))
    num_layers = plain.kv_layout.num_layers
    expected = Stream(list(tokens), table)
    advance(plain, expected, steps=-(-40 // chunk), chunk=chunk)
    stream = Stream(list(tokens), table)
    layers: list[int] = []
    while not stream.generated:
        batch = Batch((stream.next(chunk),))

        def on_layer(layer: int, item: ScheduledSequence = batch.sequences[0]) -> None:
            layers.append(layer)
            part = kv_part(plain, item.start, item.num_tokens, layer, 1)
            assert read_kv(hooked, table, part) == read_kv(plain, table, part)

        stream.take(hooked.run(batch, on_layer).tokens[0])
    assert layers == list(range(num_layers)) * -(-40 // chunk)
    assert stream.generated == expected.generated


def test_a_batch_of_copies_alone_calls_no_hook(folder: Path) -> None:
    calls: list[int] = []
    load_tiny(folder).run(Batch((), ((1, 2),)), calls.append)
    assert calls == []
