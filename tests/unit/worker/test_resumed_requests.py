"""Answers that go on after tokens generated elsewhere: nobody can tell them from whole ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from worker_benches import ENGINE, Bench, in_virtual_time, running, running_pair, spec, start_on

from forebay.core.clock import Deadline
from forebay.core.errors import DeadlineExceeded, InvalidRequest
from forebay.core.finish import FinishReason
from forebay.rpc.v1 import inference_pb2, worker_pb2
from forebay.simulator import loop
from forebay.worker.requests import accept

MODEL = worker_pb2.ModelInfo(id="sim", vocab_size=259, max_model_len=64)


def resumed(
    request: worker_pb2.SequenceSpec, choice: int, generated: list[int], request_id: str
) -> worker_pb2.SequenceSpec:
    twin = worker_pb2.SequenceSpec.FromString(request.SerializeToString())
    twin.request_id = request_id
    twin.choices.append(choice)
    twin.generated_token_ids.extend(generated)
    return twin


def check_rest(bench: Bench, request_id: str, choice: int, rest: list[int], offset: int) -> None:
    """That `request_id` generated `rest`, which begins at `offset`, and then ended as it should."""
    outputs = [output for output in bench.outputs if output.request_id == request_id]
    assert [t for output in outputs for t in output.token_ids] == rest
    assert [output.offset for output in outputs] == [offset + i for i in range(len(rest))]
    assert {output.choice for output in outputs} == {choice}
    assert bench.ends(request_id) == [FinishReason.LENGTH]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mixed_worker_goes_on_from_any_token(temperature: float) -> None:
    @in_virtual_time
    async def check() -> None:
        request = spec("whole", n=3, max_tokens=10, temperature=temperature)
        async with running() as bench:
            await bench.prefill(request)
            await asyncio.sleep(1)
            for choice in range(3):
                whole = bench.tokens("whole", choice)
                assert len(whole) == 10
                for cut in range(1, 10):
                    request_id = f"{choice}-{cut}"
                    await bench.prefill(resumed(request, choice, whole[:cut], request_id))
                    await asyncio.sleep(1)
                    check_rest(bench, request_id, choice, whole[cut:], cut)
            bench.check_empty()

    check()


@in_virtual_time
async def test_a_pair_goes_on_from_any_token() -> None:
    request = spec("whole", n=2, max_tokens=10)
    async with running_pair() as (prefill, decode):
        await start_on(prefill, decode, request)
        await asyncio.sleep(1)
        for choice in range(2):
            whole = prefill.tokens("whole", choice) + decode.tokens("whole", choice)
            assert len(whole) == 10
            for cut in range(1, 9):
                name = f"{choice}-{cut}"
                await start_on(prefill, decode, resumed(request, choice, whole[:cut], name))
                await asyncio.sleep(1)
                assert prefill.tokens(name) == whole[cut : cut + 1]
                check_rest(decode, name, choice, whole[cut + 1 :], cut + 1)
        for bench in (prefill, decode):
            bench.check_empty()


@in_virtual_time
async def test_the_rest_of_a_request_handed_over_is_what_it_would_have_been() -> None:
    """From one worker that drains to another one, all choices."""
    request = spec(n=3, max_tokens=14)
    async with running() as bench:
        await bench.prefill(request)
        await asyncio.sleep(3)
        expected = [bench.tokens("r", choice) for choice in range(3)]
    async with running() as left, running() as right:
        await left.prefill(request)
        await asyncio.sleep(0.2)
        await left.worker.drain(Deadline.after(0))
        for choice in range(3):
            begun = left.tokens("r", choice)
            assert 0 < len(begun) < 14
            await right.prefill(resumed(request, choice, begun, f"{choice}"))
        await asyncio.sleep(3)
        for choice in range(3):
            assert left.tokens("r", choice) + right.tokens(f"{choice}") == expected[choice]


@in_virtual_time
async def test_the_cached_figure_comes_with_an_attempts_first_token_only() -> None:
    request = spec("whole", prompt=8, max_tokens=12)
    async with running() as bench:
        await bench.prefill(request)
        await asyncio.sleep(1)
        whole = bench.tokens("whole")
        await bench.prefill(resumed(request, 0, whole[:9], "rest"))
        await asyncio.sleep(1)
        figures = [o.num_cached_tokens for o in bench.outputs if o.request_id == "rest"]
        assert figures == [16, 0, 0]
        assert bench.worker.description().counters.prompt_tokens == 8 + 17


@in_virtual_time
async def test_a_choice_that_was_not_asked_for_is_not_sampled() -> None:
    request = spec(n=4, max_tokens=3)
    request.choices.extend([3, 1])
    async with running(engine=ENGINE) as bench:
        await bench.prefill(request)
        await bench.prefill(spec("full", n=2, max_tokens=3))
        await asyncio.sleep(1)
        outputs = [output for output in bench.outputs if output.request_id == "r"]
        assert sorted({output.choice for output in outputs}) == [1, 3]
        assert len(bench.ends("r")) == 2
        bench.check_empty()


def wrong_choices(request: worker_pb2.SequenceSpec) -> None:
    request.choices.append(2)


def repeated_choices(request: worker_pb2.SequenceSpec) -> None:
    request.choices.extend([1, 1])


def several_choices(request: worker_pb2.SequenceSpec) -> None:
    request.generated_token_ids.append(1)


def unknown_token(request: worker_pb2.SequenceSpec) -> None:
    request.choices.append(0)
    request.generated_token_ids.extend([1, 259])


def too_long(request: worker_pb2.SequenceSpec) -> None:
    request.choices.append(0)
    request.sampling.max_tokens = 1000
    request.generated_token_ids.extend([1] * 56)


def nothing_left(request: worker_pb2.SequenceSpec) -> None:
    request.choices.append(0)
    request.generated_token_ids.extend([1] * 5)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        (wrong_choices, "choices"),
        (repeated_choices, "choices"),
        (several_choices, "choices"),
        (unknown_token, "generated_token_ids"),
        (too_long, "generated_token_ids"),
        (nothing_left, "generated_token_ids"),
    ],
)
def test_bad_beginnings_name_their_field(
    change: Callable[[worker_pb2.SequenceSpec], None], param: str
) -> None:
    async def main() -> None:
        request = spec(n=2)
        accept(request, MODEL, 10)
        change(request)
        with pytest.raises(InvalidRequest) as caught:
            accept(request, MODEL, 10)
        assert caught.value.param == param

    loop.run(main())


def test_the_longest_beginning_fits() -> None:
    async def main() -> None:
        request = spec(n=2, max_tokens=1000)
        request.choices.append(1)
        request.generated_token_ids.extend([258] * 55)
        accepted = accept(request, MODEL, 10)
        start = accepted.start
        assert (len(start.tokens), start.num_prompt_tokens, start.choices) == (63, 8, (1,))
        assert accepted.going_on == {1}
        request.sampling.CopyFrom(inference_pb2.SamplingParams(max_tokens=56, n=1))
        del request.choices[:]
        assert accept(request, MODEL, 10).start.choices == (0,)
        request.timeout_ms = 0
        with pytest.raises(DeadlineExceeded):
            accept(request, MODEL, 10)

    loop.run(main())
