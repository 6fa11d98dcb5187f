"""A real model goes on where another run of it was left, token for token, in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import GREEDY, load_tiny, random_tokens, save_tiny_llama

from forebay.core.sampling import SamplingParams
from forebay.engine.engine import Engine
from forebay.engine.interface import Runner
from forebay.engine.sequence import RequestKey, SequenceStart

NUM_TOKENS = 14
SAMPLED = SamplingParams(temperature=1.2, top_p=0.95, seed=7, max_tokens=NUM_TOKENS)
PENALISED = SamplingParams(
    temperature=0.9,
    seed=9,
    max_tokens=NUM_TOKENS,
    n=3,
    presence_penalty=0.8,
    frequency_penalty=0.7,
    repetition_penalty=1.4,
)
GREEDY_PENALISED = SamplingParams(
    temperature=0.0, max_tokens=NUM_TOKENS, frequency_penalty=1.5, repetition_penalty=1.3
)
PLAIN = SamplingParams(temperature=GREEDY.temperature, max_tokens=NUM_TOKENS)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder)
    return load_tiny(Path(folder), block_size=4)


def answers(
    runner: Runner, params: SamplingParams, choices: tuple[int, ...], generated: list[int]
) -> dict[int, list[int]]:
    """Tokens by choice, those given not among them."""
    prompt = random_tokens(11, seed=3)
    engine = Engine(runner, max_batch_tokens=8, max_num_seqs=8)
    start = SequenceStart(
        key=RequestKey("g", "r"),
        attempt=1,
        tokens=(*prompt, *generated),
        num_prompt_tokens=len(prompt),
        params=params,
        choices=choices,
        cache_root=bytes(16),
    )
    engine.submit(start, prefill_only=False)
    tokens: dict[int, list[int]] = {choice: [] for choice in choices}
    while (batch := engine.begin_step()) is not None:
        for output in engine.end_step(batch, runner.run(batch)).outputs:
            assert output.offset == len(generated) + len(tokens[output.choice])
            tokens[output.choice].append(output.token.token_id)
    engine.check_integrity()
    return tokens


@pytest.mark.parametrize(
    "params",
    [PLAIN, SAMPLED, PENALISED, GREEDY_PENALISED],
    ids=["greedy", "sampled", "penalised", "greedy_penalised"],
)
def test_an_answer_goes_on_from_any_of_its_tokens(runner: Runner, params: SamplingParams) -> None:
    whole = answers(runner, params, tuple(range(params.n)), [])
    for choice, tokens in whole.items():
        assert len(tokens) == NUM_TOKENS
        for cut in range(1, NUM_TOKENS):
            rest = answers(runner, params, (choice,), tokens[:cut])
            assert rest == {choice: tokens[cut:]}


def test_penalties_count_what_was_generated_elsewhere(runner: Runner) -> None:
    """What the comparison above rests on: as a prompt the same tokens weigh less."""
    (tokens,) = answers(runner, GREEDY_PENALISED, (0,), []).values()
    (plain,) = answers(runner, PLAIN, (0,), []).values()
    assert tokens != plain
