from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.core.finish import FinishReason
from forebay.core.kv_codec import KvCodec
from forebay.core.roles import WorkerRole
from forebay.core.sampling import SamplingParams
from forebay.rpc import conversions
from forebay.rpc.v1 import inference_pb2

floats = st.floats(width=32, allow_nan=False)
params = st.builds(
    SamplingParams,
    temperature=floats,
    top_p=floats,
    top_k=st.integers(0, 2**31 - 1),
    min_p=floats,
    presence_penalty=floats,
    frequency_penalty=floats,
    repetition_penalty=floats,
    logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), floats, max_size=3),
    seed=st.integers(0, 2**64 - 1),
    max_tokens=st.integers(0, 2**31 - 1),
    n=st.integers(0, 16),
    stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    top_logprobs=st.none() | st.integers(0, 20),
)


@given(params)
def test_sampling_comes_back_as_it_went(sampling: SamplingParams) -> None:
    message = conversions.sampling_to_proto(sampling)
    wire = inference_pb2.SamplingParams.FromString(message.SerializeToString())
    back = conversions.sampling_from_proto(wire)
    for field in fields(SamplingParams):
        assert getattr(back, field.name) == getattr(sampling, field.name), field.name


def test_absent_fields_take_the_defaults() -> None:
    assert conversions.sampling_from_proto(inference_pb2.SamplingParams()) == SamplingParams()


def test_stop_strings_stay_at_the_gateway() -> None:
    sampling = SamplingParams(stop=("a", "b"))
    back = conversions.sampling_from_proto(conversions.sampling_to_proto(sampling))
    assert back == replace(sampling, stop=())
    message = inference_pb2.SamplingParams(stop=["x"])
    assert conversions.sampling_from_proto(message).stop == ("x",)


@pytest.mark.parametrize("reason", [None, *FinishReason])
def test_finish_reasons_come_back(reason: FinishReason | None) -> None:
    assert conversions.finish_from_proto(conversions.finish_to_proto(reason)) is reason


@pytest.mark.parametrize("role", WorkerRole)
def test_roles_come_back(role: WorkerRole) -> None:
    assert conversions.role_from_proto(conversions.role_to_proto(role)) is role


@pytest.mark.parametrize("codec", KvCodec)
def test_codecs_come_back(codec: KvCodec) -> None:
    assert conversions.codec_from_proto(conversions.codec_to_proto(codec)) is codec


@pytest.mark.parametrize("value", [0, 99])
def test_an_unknown_codec_is_a_key_error(value: int) -> None:
    with pytest.raises(KeyError):
        conversions.codec_from_proto(value)  # type: ignore[arg-type]


def test_an_unknown_role_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        conversions.role_from_proto(99)  # type: ignore[arg-type]
