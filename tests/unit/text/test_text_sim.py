from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from forebay.text.sim import sim_tokenizer_spec
from forebay.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(sim_tokenizer_spec())


def test_ids_are_bytes_and_three_control_tokens() -> None:
    assert TOKENIZER.vocab_size == 259
    assert [TOKENIZER.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert [TOKENIZER.token_text(i) for i in (256, 257, 258)] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    ]
    assert TOKENIZER.eos_ids == (257,)
    assert TOKENIZER.bos_id is None


@given(st.text())
def test_a_text_is_its_utf8_bytes(text: str) -> None:
    assert TOKENIZER.encode_text(text) == list(text.encode())


def test_chat_is_chatml_without_a_default_system_prompt() -> None:
    ids = TOKENIZER.encode_chat([{"role": "user", "content": "hi"}])
    assert ids == [256, *b"user\nhi", 257, *b"\n", 256, *b"assistant\n"]


def test_the_spec_never_changes_by_itself() -> None:
    assert sim_tokenizer_spec().hash == sim_tokenizer_spec().hash
