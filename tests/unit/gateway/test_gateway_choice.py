"""From outputs as they come, in any order and more than once, to the text a client gets."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.core.finish import FinishReason
from forebay.core.sampling import SamplingParams
from forebay.gateway.choice import ChoiceText
from forebay.gateway.generation import ChoiceEnd, Chunk, Event
from forebay.rpc.conversions import finish_to_proto
from forebay.rpc.v1 import inference_pb2, worker_pb2
from forebay.text.sim import sim_tokenizer_spec
from forebay.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(sim_tokenizer_spec())
EOS = 257


def output(
    offset: int, tokens: bytes | list[int], finish: FinishReason | None = None
) -> worker_pb2.SequenceOutput:
    return worker_pb2.SequenceOutput(
        offset=offset, token_ids=list(tokens), finish_reason=finish_to_proto(finish)
    )


def choice_of(**params: object) -> ChoiceText:
    return ChoiceText(0, TOKENIZER, SamplingParams(**params))  # type: ignore[arg-type]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Chunk))


def ends_of(events: list[Event]) -> list[FinishReason]:
    return [event.reason for event in events if isinstance(event, ChoiceEnd)]


def fed(choice: ChoiceText, outputs: list[worker_pb2.SequenceOutput]) -> list[Event]:
    return [event for each in outputs for event in choice.accept(each)]


def letters(text: bytes, finish: FinishReason) -> list[worker_pb2.SequenceOutput]:
    last = len(text) - 1
    return [output(i, [token], finish if i == last else None) for i, token in enumerate(text)]


@given(st.permutations(range(8)), st.lists(st.integers(0, 7), max_size=6))
def test_order_and_repetition_change_nothing(order: list[int], again: list[int]) -> None:
    outputs = letters(b"forebay!", FinishReason.LENGTH)
    choice = choice_of()
    events = fed(choice, [outputs[i] for i in (*again[:3], *order, *again)])
    assert text_of(events) == "forebay!"
    assert ends_of(events) == [FinishReason.LENGTH]
    assert isinstance(events[-1], ChoiceEnd)
    assert len(choice.token_ids) == 8
    assert sum(len(e.tokens) for e in events if isinstance(e, Chunk)) == 8


def test_what_comes_early_waits() -> None:
    choice = choice_of()
    assert choice.accept(output(1, b"b")) == []
    assert choice.accept(output(2, b"c")) == []
    assert text_of(choice.accept(output(0, b"a"))) == "abc"
    assert choice.accept(output(1, b"b")) == []
    assert len(choice.token_ids) == 3


def test_several_tokens_in_one_output() -> None:
    choice = choice_of()
    events = fed(choice, [output(3, b"de", FinishReason.LENGTH), output(0, b"abc")])
    assert text_of(events) == "abcde"
    assert len(choice.token_ids) == 5


def test_nothing_comes_after_the_end() -> None:
    choice = choice_of()
    fed(choice, letters(b"ab", FinishReason.LENGTH))
    assert fed(choice, [output(2, b"c"), output(3, b"d", FinishReason.STOP)]) == []
    assert len(choice.token_ids) == 2


def test_the_end_token_counts_and_is_not_shown() -> None:
    choice = choice_of(stop_token_ids=(EOS,))
    events = fed(choice, [output(0, b"a"), output(1, [EOS], FinishReason.STOP)])
    assert text_of(events) == "a"
    assert ends_of(events) == [FinishReason.STOP]
    assert len(choice.token_ids) == 2
    assert not choice.stopped_here


def test_a_stop_token_that_is_text_is_not_shown_either() -> None:
    events = fed(choice_of(stop_token_ids=(ord("c"),)), letters(b"abc", FinishReason.STOP))
    assert text_of(events) == "ab"


@pytest.mark.parametrize("cuts", range(8))
def test_a_stop_string_split_over_tokens_never_shows(cuts: int) -> None:
    text = b"one STOP two"
    chance = random.Random(cuts)
    choice, events, at = choice_of(stop=("STOP",)), list[Event](), 0
    while at < len(text):
        size = chance.randint(1, 4)
        events += choice.accept(output(at, text[at : at + size]))
        at += size
    assert text_of(events) == "one "
    assert ends_of(events) == [FinishReason.STOP]
    assert choice.stopped_here
    assert len(choice.token_ids) == text.index(b"P") + 1


def test_what_began_like_a_stop_string_is_flushed_at_the_end() -> None:
    choice = choice_of(stop=("STOP",))
    events = fed(choice, letters(b"a STO", FinishReason.LENGTH))
    assert text_of(events) == "a STO"
    assert ends_of(events) == [FinishReason.LENGTH]
    assert not choice.stopped_here


def test_text_held_back_for_a_stop_string_comes_when_it_is_none() -> None:
    choice = choice_of(stop=("STOP",))
    events = fed(choice, [output(i, [token]) for i, token in enumerate(b"STOX")])
    chunks = [event.text for event in events if isinstance(event, Chunk)]
    assert chunks == ["", "", "", "STOX"]


def test_a_stop_string_in_the_last_token_is_a_stop_not_a_length() -> None:
    choice = choice_of(stop=("c",))
    events = fed(choice, letters(b"abc", FinishReason.LENGTH))
    assert text_of(events) == "ab"
    assert ends_of(events) == [FinishReason.STOP]
    assert not choice.stopped_here  # the worker has ended by itself


@pytest.mark.parametrize("character", ["é", "€", "🌊"])
def test_a_split_character_is_shown_whole(character: str) -> None:
    encoded = character.encode()
    events = fed(choice_of(), letters(b"a" + encoded + b"b", FinishReason.LENGTH))
    assert text_of(events) == f"a{character}b"
    assert all("\ufffd" not in e.text for e in events if isinstance(e, Chunk))


def test_half_a_character_at_the_end_is_flushed_once() -> None:
    events = fed(choice_of(), letters("a€".encode()[:-1], FinishReason.LENGTH))
    assert text_of(events) == "a\ufffd"


def test_logprobs_stay_with_their_tokens() -> None:
    message = output(0, b"ab")
    for token, logprob in ((97, -0.5), (98, -1.5)):
        message.logprobs.append(
            inference_pb2.TokenLogprob(
                token_id=token,
                logprob=logprob,
                top=[inference_pb2.TokenLogprob(token_id=token, logprob=logprob)],
            )
        )
    (chunk,) = choice_of(top_logprobs=1).accept(message)
    assert isinstance(chunk, Chunk)
    assert [(t.token_id, t.logprob, t.top) for t in chunk.tokens] == [
        (97, -0.5, ((97, -0.5),)),
        (98, -1.5, ((98, -1.5),)),
    ]


def test_what_came_too_early_is_forgotten_when_another_leg_goes_on() -> None:
    choice = choice_of()
    assert choice.accept(output(1, b"X")) == []
    choice.resume()
    events = fed(choice, letters(b"ab", FinishReason.LENGTH))
    assert text_of(events) == "ab"
    assert choice.token_ids == list(b"ab")
