from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_builders import byte_spec, trained_sentencepiece

from forebay.text.detokenizer import IncrementalDetokenizer, StopWatcher
from forebay.text.sim import sim_tokenizer_spec
from forebay.text.spec import TokenizerSpec
from forebay.text.tokenizer import Tokenizer

SIM = Tokenizer(sim_tokenizer_spec())


def sentencepiece_tokenizer() -> Tokenizer:
    value = json.loads(trained_sentencepiece().to_str())
    value["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    return Tokenizer(TokenizerSpec(json.dumps(value), "", "<s>", "</s>", "", "<unk>"))


SENTENCEPIECE = sentencepiece_tokenizer()


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@given(st.text())
def test_text_survives(text: str) -> None:
    assert "".join(pieces(SIM, SIM.encode_text(text))) == text


@given(st.lists(st.integers(0, 260)))
def test_any_ids_equal_decoding_them_at_once(ids: list[int]) -> None:
    expected = b"".join(SIM.token_bytes(i) for i in ids).decode(errors="replace")
    assert "".join(pieces(SIM, ids)) == expected


@given(st.text(min_size=1))
def test_no_replacement_character_for_split_characters(text: str) -> None:
    text = text.replace("\ufffd", "")
    assert all("\ufffd" not in piece for piece in pieces(SIM, SIM.encode_text(text)))


def test_a_character_arrives_with_its_last_byte() -> None:
    assert pieces(SIM, list("é€😀".encode())) == ["", "é", "", "", "€", "", "", "", "😀", ""]


def test_control_tokens_are_skipped_even_inside_a_character() -> None:
    first, second = "é".encode()
    assert "".join(pieces(SIM, [256, first, 258, second, 257])) == "é"


def test_an_incomplete_end_is_replaced_on_finish() -> None:
    assert pieces(SIM, [0x61, 0xE2, 0x82]) == ["a", "", "", "\ufffd"]


def test_markers_that_are_not_special_are_text() -> None:
    tokenizer = Tokenizer(byte_spec(("<think>", False), ("<|tool|>", True)))
    assert "".join(pieces(tokenizer, [259, 0x61, 260])) == "<think>a"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_sentencepiece_text_survives_but_for_a_leading_space(text: str) -> None:
    """A first word has the same ids with one space in front and without."""
    ids = SENTENCEPIECE.encode_text(text)
    assert "".join(pieces(SENTENCEPIECE, ids)) == text.removeprefix(" ")


def test_sentencepiece_drops_one_leading_space_only() -> None:
    ids = SENTENCEPIECE.encode_text("the dog")
    assert "".join(pieces(SENTENCEPIECE, ids)) == "the dog"
    assert "".join(pieces(SENTENCEPIECE, ids + ids)) == "the dog the dog"


def test_a_tokenizer_without_prefix_space_keeps_the_space() -> None:
    value = json.loads(trained_sentencepiece().to_str())
    value["pre_tokenizer"]["prepend_scheme"] = "never"
    value["decoder"] = {"type": "ByteFallback"}
    spec = replace(sim_tokenizer_spec(), tokenizer_json=json.dumps(value))
    tokenizer = Tokenizer(spec)
    assert "".join(pieces(tokenizer, tokenizer.encode_text(" the dog"))) == " the dog"


def reference(stops: list[str], text: str) -> tuple[str, str | None]:
    """Looks at ever longer beginnings of the text until one ends in a stop string."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def watch(stops: list[str], chunks: list[str]) -> tuple[list[str], str | None]:
    watcher = StopWatcher(stops)
    emitted: list[str] = []
    for chunk in chunks:
        emit, matched = watcher.push(chunk)
        emitted.append(emit)
        if matched is not None:
            return emitted, matched
    return [*emitted, watcher.finish()], None


SMALL = st.text("ab\n", max_size=6)


@given(st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4), st.lists(SMALL))
def test_stop_watcher_equals_the_reference(stops: list[str], chunks: list[str]) -> None:
    emitted, matched = watch(stops, chunks)
    assert ("".join(emitted), matched) == reference(stops, "".join(chunks))


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.text("ab"))
def test_only_possible_beginnings_are_held_back(stops: list[str], text: str) -> None:
    watcher = StopWatcher(stops)
    emitted = ""
    for index, char in enumerate(text):
        emit, matched = watcher.push(char)
        emitted += emit
        if matched is not None:
            return
        held = text[len(emitted) : index + 1]
        assert held == "" or any(stop.startswith(held) and len(held) < len(stop) for stop in stops)
        assert text.startswith(emitted)


def test_a_stop_string_split_over_pushes_never_leaks() -> None:
    assert watch(["</answer>"], ["42</", "ans", "wer", "> more"]) == (
        ["42", "", "", ""],
        "</answer>",
    )


def test_held_text_is_released_when_it_was_no_stop_string() -> None:
    assert watch(["END"], ["a E", "N", "X"]) == (["a ", "", "ENX", ""], None)
    assert watch(["END"], ["a EN"]) == (["a ", "EN"], None)


def test_the_first_complete_stop_string_wins() -> None:
    assert watch(["abcd", "bc"], ["abcd"]) == (["a"], "bc")
    assert watch(["bc", "abc"], ["xabc"]) == (["x"], "abc")


def test_nothing_follows_a_match() -> None:
    watcher = StopWatcher(["x"])
    assert watcher.push("ax") == ("a", "x")
    assert watcher.push("b") == ("", "x")
    assert watcher.finish() == ""


def test_without_stop_strings_everything_passes() -> None:
    assert watch([], ["a", "", "b"]) == (["a", "", "b", ""], None)


def test_empty_stop_strings_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        StopWatcher(["a", ""])
