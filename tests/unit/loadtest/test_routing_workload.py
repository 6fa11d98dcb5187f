from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path

import pytest

from forebay.text.sim import sim_tokenizer_spec
from forebay.text.tokenizer import Tokenizer
from forebay_loadtest.routing.workload import (
    ConversationMix,
    InfiniteCache,
    RoutedRequest,
    conversations,
    random_prompts,
    scaled_trace,
)

MIX = ConversationMix(num_live=8)
BLOCK = 16


def first(count: int, seed: int = 1) -> list[RoutedRequest]:
    return list(islice(conversations(MIX, seed), count))


def test_a_seed_gives_the_same_conversations_and_another_one_others() -> None:
    assert first(40) == first(40)
    assert first(40) != first(40, seed=2)


def test_every_turn_holds_the_turn_before_it_and_waits_for_it() -> None:
    requests = first(120)
    later = [each for each in requests if each.after is not None]
    assert later
    for each in later:
        assert each.after is not None
        assert each.messages[: len(requests[each.after].messages)] == requests[each.after].messages
        assert len(each.messages) == len(requests[each.after].messages) + 2
        assert each.number - each.after > MIX.num_live // 2 - 1


def test_conversations_share_few_system_prompts_the_first_more_often_than_the_last() -> None:
    requests = first(400)
    begun = [each.messages[0] for each in requests if each.after is None]
    counts = sorted((begun.count(system) for system in set(begun)), reverse=True)
    assert len(counts) <= MIX.num_system_prompts
    assert counts[0] >= 3 * counts[-1]


def test_a_rendered_prompt_has_one_character_for_every_token() -> None:
    tokenizer = Tokenizer(sim_tokenizer_spec())
    for request in first(20):
        messages = [{"role": role, "content": text} for role, text in request.messages]
        assert len(tokenizer.encode_chat(messages)) == len(request.rendered())


def test_a_trace_keeps_which_blocks_are_the_same(tmp_path: Path) -> None:
    rows = [
        {"input_length": 1030, "hash_ids": [0, 1, 2]},
        {"input_length": 1536, "hash_ids": [0, 1, 3]},
    ]
    trace = tmp_path / "trace.jsonl.gz"
    with gzip.open(trace, "wt") as out:
        out.write("".join(json.dumps(row) + "\n" for row in rows))
    short, long = (each.messages[0][1] for each in scaled_trace(trace, 16, seed=3))
    assert (len(short), len(long)) == (64, 96)
    assert short == long[:64]
    other, _ = (each.messages[0][1] for each in scaled_trace(trace, 16, seed=4))
    assert other != short


def test_random_prompts_have_their_length_and_nothing_in_common() -> None:
    texts = [each.messages[0][1] for each in islice(random_prompts(100, 1), 20)]
    assert {len(text) for text in texts} == {100}
    assert len({text[:16] for text in texts}) == 20


def test_the_ideal_cache_knows_full_blocks_of_earlier_prompts() -> None:
    cache = InfiniteCache(BLOCK)
    assert cache.num_cached_tokens("a" * 40) == 0
    assert cache.num_cached_tokens("a" * 40) == 32
    assert cache.num_cached_tokens("a" * 40 + "b" * 40) == 32
    assert cache.num_cached_tokens("b" * 40) == 0
    assert cache.num_blocks == 2 + 3 + 2


@pytest.mark.parametrize(("length", "cached"), [(31, 16), (32, 16), (33, 32)])
def test_the_ideal_cache_leaves_a_token_to_compute(length: int, cached: int) -> None:
    cache = InfiniteCache(BLOCK)
    cache.num_cached_tokens("a" * 64)
    assert cache.num_cached_tokens("a" * length) == cached
