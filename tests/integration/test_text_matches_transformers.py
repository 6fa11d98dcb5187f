"""Our ids equal those of transformers, for the default model and for small ones of other kinds."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from forebay.text.detokenizer import IncrementalDetokenizer
from forebay.text.gguf_tokenizer import spec_from_gguf
from forebay.text.hf_tokenizer import spec_from_folder
from forebay.text.tokenizer import Tokenizer

SCRIPTS = [
    (0x20, 0x7E),
    (0xA0, 0x24F),
    (0x300, 0x36F),
    (0x370, 0x3FF),
    (0x400, 0x4FF),
    (0x590, 0x5FF),
    (0x600, 0x6FF),
    (0x900, 0x97F),
    (0xE00, 0xE7F),
    (0x1100, 0x11FF),
    (0x1F00, 0x1FFF),
    (0x2000, 0x206F),
    (0x2150, 0x218B),
    (0x3040, 0x30FF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0xE000, 0xE0FF),
    (0xFF00, 0xFFEF),
    (0x1D7CE, 0x1D7FF),
    (0x1F300, 0x1FAFF),
    (0x0, 0x10FFFF),
]
FRAGMENTS = [
    " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u3000", "\u00a0", "\u200b", "\u200d",
    "0", "7", "42", "2024", "3.14159", "1,000,000", "\u0663", "\u00b2", "\u2167", "\uff11",
    "'s", "'LL", "n't", "don't", "I'm", "_", "__init__", "--", "...", "?!", "=>", "->", "==",
    "def f(x):\n    return x ** 2\n", "#include <stdio.h>\n", "{\"a\": [1, 2]}", "</div>", "<b>",
    "the", "The", " quick", "ing", "naïve", "e\u0301", "\u00e9", "\u1100\u1161\u11a8", "straße",
    "你好", "世界", "こんにちは", "한국어", "привет", "مرحبا", "שלום", "नमस्ते", "ไทย",
    "👍🏽", "👩‍👩‍👧‍👦", "🇫🇷", "❤️", "\ufe0f", "\ufffd", "\0", "\x7f", "\u0378", "\U0010ffff",
]  # fmt: skip
BY_HAND = [
    "",
    " ",
    "\n",
    "Hello, world!",
    "What is the capital of France?",
    "  leading and trailing  ",
    "   5 and   x",
    "12345678901234567890",
    "a1b22c333d4444",
    "line one\nline two\r\n\r\n\tindented\n\n\n\n",
    "x = [i for i in range(10) if i % 2 == 0]  # comment",
    "https://example.com/path?query=1&other=%20#frag",
    "I'll they've she'd WE'RE it's 's 'S",
    "\u0301\u0301combining first",
    "Zalgo: z\u0351\u036b\u0343a\u0329\u034el\u0354\u0308g\u033c\u0306o\u0321\u0307",
    "\u202eright to left\u202c",
    "ﷺ ﬁ ﬀ Ⅷ ½ ①",
    "\U0001d518\U0001d52b\U0001d526 \U0001d7d9\U0001d7da",
    "{}" * 50,
    "a" * 300,
    " " * 100,
    "\n" * 33,
    "<|im_start",
    "im_end|>",
    "<|im_start |>",
    "< |im_end|>",
    "<|IM_END|>",
    "<think>hm</think>",
    "[INST] hi [/INST]",
    "\ue000\ue001\uf8ff",
]


def random_texts(count: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 20)):
            if rng.random() < 0.6:
                parts.append(rng.choice(FRAGMENTS))
            else:
                low, high = rng.choice(SCRIPTS)
                code = rng.randint(low, high)
                parts.append("" if 0xD800 <= code < 0xE000 else chr(code))
        yield "".join(parts)


TEXTS = [*BY_HAND, *random_texts(1500, seed=20240229)]


def with_control_tokens(seed: int, spellings: Sequence[str]) -> list[str]:
    rng = random.Random(seed)
    texts = [f"{spelling}" for spelling in spellings] + [f"a {s} b{s}" for s in spellings]
    for text in random_texts(300, seed):
        at = rng.randint(0, len(text))
        texts.append(text[:at] + rng.choice(spellings) + text[at:])
    return texts


@pytest.fixture(scope="module")
def theirs(default_model_path: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(
        default_model_path.parent, gguf_file=default_model_path.name
    )


@pytest.fixture(scope="module")
def ours(default_model_path: Path) -> Tokenizer:
    return Tokenizer(spec_from_gguf(default_model_path))


def decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return "".join(map(detokenizer.push, ids)) + detokenizer.finish()


def spellings_of(tokenizer: Tokenizer) -> list[str]:
    return [
        tokenizer.token_text(token_id)
        for token_id in range(tokenizer.vocab_size)
        if tokenizer.is_control(token_id)
    ]


def test_the_model_has_the_tokens_we_think(ours: Tokenizer, theirs: Any) -> None:
    assert ours.vocab_size == len(theirs) == 49152
    assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_ids == (theirs.eos_token_id,)
    assert spellings_of(ours) == [str(token) for token in theirs.added_tokens_decoder.values()]


def test_text_ids(ours: Tokenizer, theirs: Any) -> None:
    assert len(TEXTS) >= 1000
    different = [text for text in TEXTS if ours.encode_text(text) != theirs(text)["input_ids"]]
    assert different == []


def expressible(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Without those for which the vocabulary lacks bytes (planes of Unicode nobody uses)."""
    pieces = {tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)}
    missing = bytes(value for value in range(256) if bytes([value]) not in pieces)
    return [text for text in texts if not set(missing) & set(text.encode())]


def test_text_survives(ours: Tokenizer) -> None:
    texts = expressible(ours, TEXTS)
    assert len(texts) > 1000
    assert [text for text in texts if decoded(ours, ours.encode_text(text)) != text] == []


def test_control_token_spellings_are_text(ours: Tokenizer, theirs: Any) -> None:
    for text in with_control_tokens(7, spellings_of(ours)):
        ids = ours.encode_text(text)
        assert not any(map(ours.is_control, ids))
        assert ids == theirs(text, split_special_tokens=True)["input_ids"]
        if expressible(ours, [text]):
            assert decoded(ours, ids) == text


def conversations(seed: int, texts: Sequence[str]) -> Iterator[list[dict[str, str]]]:
    """Each text once, spread over conversations of one to six turns, some with a system prompt."""
    rng = random.Random(seed)
    left = list(texts)
    while left:
        turns: list[dict[str, str]] = []
        if rng.random() < 0.5:
            turns.append({"role": "system", "content": left.pop()})
        for index in range(rng.randint(1, 6)):
            if left:
                turns.append({"role": ("user", "assistant")[index % 2], "content": left.pop()})
        yield turns


def test_chat_ids(ours: Tokenizer, theirs: Any) -> None:
    for messages in conversations(3, TEXTS):
        for generate in (True, False):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=generate)
            ids = ours.encode_chat(messages, add_generation_prompt=generate)
            assert ids == expected["input_ids"], messages


def test_control_tokens_in_a_chat_come_from_the_template_only(ours: Tokenizer, theirs: Any) -> None:
    texts = expressible(ours, with_control_tokens(11, spellings_of(ours)))
    assert len(texts) > 200
    for messages in conversations(5, texts):
        ids = ours.encode_chat(messages)
        harmless = [{**message, "content": "x"} for message in messages]
        of_the_template = theirs.apply_chat_template(harmless, add_generation_prompt=True)
        assert list(filter(ours.is_control, ids)) == list(
            filter(ours.is_control, of_the_template["input_ids"])
        )
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert theirs.decode(ids) == rendered


CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog doesn't mind at all",
    "numbers: 1234567 890 12 3 2024 31415926 100 1000 10000",
    "def main():\n    return [x for x in range(100)]\n\n\n\tprint(x)",
    "naïve café Ünïcödé 你好世界 こんにちは 안녕하세요 привет мир",
] * 5
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(pattern: str) -> FastTokenizer:
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write_gguf(path: Path, kind: str, pre: str, fast: FastTokenizer, types: list[int]) -> None:
    model = json.loads(fast.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    rank = {left + right: index for index, (left, right) in enumerate(model["merges"])}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types + [1] * (len(tokens) - len(types)))
    if kind == "gpt2":
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
        writer.add_add_bos_token(True)
    else:
        writer.add_token_scores([-float(rank.get(token, 10_000)) for token in tokens])
        writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def check_against(ours: Tokenizer, theirs: Any, texts: Sequence[str]) -> None:
    for text in texts:
        assert ours.encode_text(text) == theirs(text)["input_ids"], text
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        assert ours.encode_chat(messages) == theirs.apply_chat_template(messages)["input_ids"], text


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-2"])
def test_small_byte_level_gguf(tmp_path: Path, pre: str) -> None:
    write_gguf(tmp_path / "m.gguf", "gpt2", pre, byte_level(r" ?\p{L}+| ?\p{N}+|\s+"), [3] * 3)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    check_against(Tokenizer(spec_from_gguf(tmp_path / "m.gguf")), theirs, TEXTS[:300])


def test_small_sentencepiece_gguf(tmp_path: Path) -> None:
    fast = FastTokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))],
        limit_alphabet=60,
        show_progress=False,
    )
    fast.train_from_iterator([word for text in CORPUS for word in text.split()], trainer)
    write_gguf(tmp_path / "m.gguf", "llama", "default", fast, [2, 3, 3] + [6] * 256)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = Tokenizer(spec_from_gguf(tmp_path / "m.gguf"))
    texts = [text for text in TEXTS[:300] if "\u2581" not in text]
    check_against(ours, theirs, texts)
    for text in texts:
        ids = ours.encode_text(text)
        assert decoded(ours, ids) == theirs.decode(ids, skip_special_tokens=True)
        assert decoded(ours, ids) == text.removeprefix(" ")


@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}])
def test_saved_folder(tmp_path: Path, flags: dict[str, bool]) -> None:
    fast = byte_level(r" ?\p{L}+| ?\p{N}+|\s+")
    fast.normalizer = normalizers.NFC()
    fast.add_tokens([AddedToken("<tool>", **flags), AddedToken("    ", normalized=False), "quick"])
    theirs: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=AddedToken("<|im_start|>", special=True, **flags),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    theirs.chat_template = (
        "{% for m in messages %}  {{ bos_token }}  {{ m.content }}<tool>x<tool> {{ eos_token }}"
        "\n{% endfor %}"
    )
    theirs.save_pretrained(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    spec = spec_from_folder(tmp_path)
    assert (spec.bos_token, spec.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert spec.chat_template == theirs.chat_template
    check_against(Tokenizer(spec), theirs, TEXTS[:300])


def test_saved_folder_of_the_older_llama_kind(tmp_path: Path) -> None:
    """A space before every span comes from a normalizer; BOS from the configuration."""
    fast = FastTokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))],
        limit_alphabet=60,
        show_progress=False,
    )
    fast.train_from_iterator([word for text in CORPUS for word in text.split()], trainer)
    value = json.loads(fast.to_str())
    value["added_tokens"] = value["added_tokens"][:3]
    fast = FastTokenizer.from_str(json.dumps(value))
    theirs: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        add_bos_token=True,
        add_eos_token=True,
    )
    theirs.chat_template = (
        "{% for m in messages %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% endfor %}"
    )
    theirs.save_pretrained(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = Tokenizer(spec_from_folder(tmp_path))
    assert ours.encode_text("the")[0] == 1 and ours.encode_text("the")[-1] == 2
    check_against(ours, theirs, TEXTS[:300])
