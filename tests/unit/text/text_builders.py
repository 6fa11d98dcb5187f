"""Small tokenizers for the tests of `forebay.text`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from forebay.text.sim import sim_tokenizer_spec
from forebay.text.spec import TokenizerSpec
from forebay.text.tokenizer_json import added_token

CHATML = sim_tokenizer_spec().chat_template

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog doesn't mind at all",
    "numbers: 1234567 890 12 3 2024 31415926 100 1000 10000",
    "def main():\n    return [x for x in range(100)]\n\n\n\tprint(x)",
    "naïve café Ünïcödé 你好世界 こんにちは 안녕하세요 привет мир",
] * 5

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_spec(*added: tuple[str, bool], template: str = CHATML, **changes: Any) -> TokenizerSpec:
    """The sim tokenizer with more added tokens, (content, special) each, from id 259 on."""
    spec = sim_tokenizer_spec()
    tokenizer = json.loads(spec.tokenizer_json)
    for index, (content, special) in enumerate(added):
        token = {**added_token(259 + index, content, special=special), **changes}
        tokenizer["added_tokens"].append(token)
        tokenizer["model"]["vocab"][content] = 259 + index
    return replace(spec, tokenizer_json=json.dumps(tokenizer), chat_template=template)


def trained_byte_level(pattern: str, vocab_size: int = 400) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def trained_sentencepiece(vocab_size: int = 450) -> Tokenizer:
    """Llama-2 like: <unk>, <s>, </s>, 256 byte tokens, then characters and merges."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
        limit_alphabet=60,
        show_progress=False,
    )
    tokenizer.train_from_iterator([word for text in CORPUS for word in text.split()], trainer)
    value = json.loads(tokenizer.to_str())
    value["added_tokens"] = [t for t in value["added_tokens"] if "<0x" not in t["content"]]
    return Tokenizer.from_str(json.dumps(value))


def model_of(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """(tokens by id, merges as a GGUF spells them)."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [" ".join(merge) for merge in model["merges"]]


def write_gguf(
    path: Path,
    *,
    model: str,
    tokens: Sequence[str],
    types: Sequence[int],
    pre: str | None = None,
    merges: Sequence[str] | None = None,
    scores: Sequence[float] | None = None,
    template: str = "",
    **fields: int | bool,
) -> Path:
    """`fields`: more `tokenizer.ggml.*` keys, such as bos_token_id or add_bos_token."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types))
    if merges is not None:
        writer.add_token_merges(list(merges))
    if scores is not None:
        writer.add_token_scores(list(scores))
    if template:
        writer.add_chat_template(template)
    for name, value in fields.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
