from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from text_builders import (
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    model_of,
    trained_byte_level,
    trained_sentencepiece,
    write_gguf,
)
from tokenizers import Tokenizer as FastTokenizer

from forebay.core.errors import ModelFileError
from forebay.text.gguf_tokenizer import spec_from_gguf, spec_from_gguf_reader
from forebay.text.tokenizer import Tokenizer

AB: dict[str, Any] = {
    "model": "gpt2",
    "tokens": ["a", "b", "ab"],
    "types": [1, 1, 1],
    "merges": ["a b"],
}

TEXTS = [
    "the quick brown fox doesn't mind 1234567 dogs",
    "  def main():\n    return 12 \r\n\r\n\n  x",
    "你好世界 naïve 😀 \t 'LL 3.14",
    "",
]


@pytest.mark.parametrize(
    ("pre", "pattern"),
    [
        ("smollm", GPT2_PATTERN),
        ("gpt-2", GPT2_PATTERN),
        ("default", GPT2_PATTERN),
        ("llama-bpe", LLAMA3_PATTERN),
        ("qwen2", LLAMA3_PATTERN.replace("{1,3}", "")),
    ],
)
def test_byte_level_ids_equal_the_tokenizer_it_was_made_from(
    tmp_path: Path, pre: str, pattern: str
) -> None:
    fast = trained_byte_level(pattern)
    tokens, merges = model_of(fast)
    path = write_gguf(
        tmp_path / "m.gguf",
        model="gpt2",
        pre=pre,
        tokens=tokens,
        types=[3] * 3 + [1] * (len(tokens) - 3),
        merges=merges,
        template="{{ bos_token }}{{ messages[0].content }}",
        bos_token_id=1,
        eos_token_id=2,
    )
    tokenizer = Tokenizer(spec_from_gguf(path))
    for text in TEXTS:
        assert tokenizer.encode_text(text) == fast.encode(text).ids
    assert tokenizer.encode_chat([{"role": "user", "content": "the"}]) == [
        1,
        *fast.encode("the").ids,
    ]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert [tokenizer.is_control(i) for i in range(4)] == [True, True, True, False]
    assert tokenizer.vocab_size == len(tokens)


def digit_groups(pre: str, tmp_path: Path, text: str) -> list[bytes]:
    """The pieces of `text`, with merges for every pair and triple of one digit."""
    tokens = [*map(chr, range(0x21, 0x7F)), "\u0120", "\u010a", "77", "777", "7777", "\u01207"]
    merges = ["7 7", "77 7", "77 77", "\u0120 7"]
    path = write_gguf(
        tmp_path / f"{pre}.gguf",
        model="gpt2",
        pre=pre,
        tokens=tokens,
        types=[1] * len(tokens),
        merges=merges,
    )
    tokenizer = Tokenizer(spec_from_gguf(path))
    return [tokenizer.token_bytes(i) for i in tokenizer.encode_text(text)]


@pytest.mark.parametrize(
    ("pre", "groups"),
    [
        ("gpt-2", [b"a", b" ", b"7777"]),
        ("llama-bpe", [b"a", b" ", b"777", b"7"]),
        ("deepseek-v3", [b"a", b" ", b"777", b"7"]),
        ("qwen2", [b"a", b" ", b"7", b"7", b"7", b"7"]),
        ("deepseek-llm", [b"a", b" ", b"7", b"7", b"7", b"7"]),
    ],
)
def test_digits_are_grouped_as_trained(pre: str, groups: list[bytes], tmp_path: Path) -> None:
    assert digit_groups(pre, tmp_path, "a 7777") == groups


def cuts(pre: str, tmp_path: Path, text: str) -> list[str]:
    """How the pre-tokenizer cuts `text`."""
    path = write_gguf(
        tmp_path / "cuts.gguf",
        model="gpt2",
        pre=pre,
        tokens=["a", "b", "ab"],
        types=[1] * 3,
        merges=["a b"],
    )
    from_spec = json.loads(spec_from_gguf(path).tokenizer_json)
    from_spec["model"] = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    fast = FastTokenizer.from_str(json.dumps(from_spec))
    return [text[start:end] for _, (start, end) in fast.pre_tokenizer.pre_tokenize_str(text)]


def test_deepseek_v3_cuts(tmp_path: Path) -> None:
    text = "Hello, 世界カタ 12345\n\n .word"
    assert cuts("deepseek-v3", tmp_path, text) == [
        "Hello",
        ",",
        " ",
        "世界カタ",
        " ",
        "123",
        "45",
        "\n\n",
        " .",
        "word",
    ]


def test_deepseek_llm_cuts(tmp_path: Path) -> None:
    text = "Hello, world 世界 привет 12\n\nx"
    assert cuts("deepseek-llm", tmp_path, text) == [
        "Hello",
        ",",
        " world",
        " ",
        "世界",
        " привет",
        " ",
        "1",
        "2",
        "\n",
        "\n",
        "x",
    ]


def test_sentencepiece_from_scores(tmp_path: Path) -> None:
    fast = trained_sentencepiece()
    tokens, merges = model_of(fast)
    rank = {merge.replace(" ", ""): index for index, merge in enumerate(merges)}
    path = write_gguf(
        tmp_path / "m.gguf",
        model="llama",
        tokens=tokens,
        types=[2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        scores=[-float(rank.get(token, 10_000)) for token in tokens],
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
    )
    tokenizer = Tokenizer(spec_from_gguf(path))
    for text in [*TEXTS[:3], " leading", "the<s>", "😀"]:
        expected = fast.encode(text.replace("<s>", "")).ids
        if "<s>" not in text:
            assert tokenizer.encode_text(text) == [1, *expected]
        else:
            assert tokenizer.encode_text(text).count(1) == 1
    assert tokenizer.token_bytes(3 + 0xE4) == b"\xe4"
    assert tokenizer.strips_leading_space


def test_sentencepiece_without_prefix_space_or_bos(tmp_path: Path) -> None:
    fast = trained_sentencepiece()
    tokens, merges = model_of(fast)
    path = write_gguf(
        tmp_path / "m.gguf",
        model="llama",
        tokens=tokens,
        types=[2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        merges=merges,
        bos_token_id=1,
        eos_token_id=2,
        add_bos_token=False,
        add_eos_token=True,
        add_space_prefix=False,
    )
    tokenizer = Tokenizer(spec_from_gguf(path))
    ids = tokenizer.encode_text("the")
    assert ids[-1] == 2 and 1 not in ids
    assert b"".join(map(tokenizer.token_bytes, ids)) == b"the"
    assert not tokenizer.strips_leading_space


def test_token_types(tmp_path: Path) -> None:
    user = "<\uff5cUser\uff5c>"
    tokens = ["<", "t", "h", ">", "\u0120", "  ", "<th>", user, "th"]
    path = write_gguf(
        tmp_path / "m.gguf",
        model="gpt2",
        pre="default",
        tokens=tokens,
        types=[1, 1, 1, 1, 1, 4, 4, 3, 1],
        merges=["t h"],
        template="<th>" + user + "{{ messages[0].content }}",
        eos_token_id=8,
    )
    tokenizer = Tokenizer(spec_from_gguf(path))
    assert tokenizer.encode_text("th  <th>") == [1, 2, 5, 0, 1, 2, 3]
    assert tokenizer.encode_chat([{"role": "user", "content": "<th>"}]) == [6, 7, 0, 1, 2, 3]
    assert (tokenizer.token_bytes(6), tokenizer.token_bytes(7)) == (b"<th>", b"")
    assert tokenizer.is_control(8)


def test_an_open_reader_serves_as_well(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", **AB)
    assert spec_from_gguf_reader(gguf.GGUFReader(path)) == spec_from_gguf(path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: write_gguf(p, model="t5", tokens=["a"], types=[1]), "'t5' is not supported"),
        (
            lambda p: write_gguf(
                p,
                model="gpt2",
                pre="tekken",
                tokens=["a", "b", "ab"],
                types=[1] * 3,
                merges=["a b"],
            ),
            "'tekken' is not supported",
        ),
        (lambda p: write_gguf(p, model="gpt2", tokens=["a"], types=[1]), "no merges"),
        (
            lambda p: write_gguf(p, model="gpt2", tokens=["a"], types=[1, 1], merges=["a b"]),
            "length",
        ),
        (lambda p: p.write_bytes(b"GGUF"), "cannot be read"),
        (lambda p: p.write_bytes(b"\0" * 64), "cannot be read"),
        (lambda p: None, "cannot be read"),
    ],
)
def test_unusable_files_are_model_file_errors(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "m.gguf"
    write(path)
    with pytest.raises(ModelFileError, match=message):
        spec_from_gguf(path)


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match="no tokenizer"):
        spec_from_gguf(tmp_path / "m.gguf")
