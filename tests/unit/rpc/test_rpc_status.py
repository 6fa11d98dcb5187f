from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from forebay.core import errors
from forebay.rpc.status import from_grpc, mapped, trailing_metadata


def all_subclasses(cls: type[errors.ForebayError]) -> list[type[errors.ForebayError]]:
    return [cls, *(sub for child in cls.__subclasses__() for sub in all_subclasses(child))]


EVERY_ERROR = [
    cls for cls in all_subclasses(errors.ForebayError) if cls.__module__ == "forebay.core.errors"
]


@pytest.mark.parametrize("cls", EVERY_ERROR)
def test_every_error_has_a_row(cls: type[errors.ForebayError]) -> None:
    row = mapped(cls("message"))
    assert 400 <= row.http <= 599
    assert row.grpc is not grpc.StatusCode.OK
    assert row.type


@pytest.mark.parametrize("cls", EVERY_ERROR)
def test_what_comes_back_has_the_same_row(cls: type[errors.ForebayError]) -> None:
    error = cls("message")
    row = mapped(error)
    back = from_grpc(row.grpc, "message", dict(trailing_metadata(error)))
    assert mapped(back) == row
    assert isinstance(error, type(back)) or row.http == 500


@pytest.mark.parametrize(
    "code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]
)
def test_every_status_becomes_an_error(code: grpc.StatusCode) -> None:
    error = from_grpc(code, "message", {})
    assert error.message == "message"
    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        assert isinstance(error, errors.InternalError)


def test_time_to_come_back_travels_for_us_and_for_others() -> None:
    metadata = dict(trailing_metadata(errors.Overloaded("full", retry_after_s=1.25)))
    assert metadata["forebay-retry-after-ms"] == "1250"
    raw = metadata["grpc-status-details-bin"]
    assert isinstance(raw, bytes)
    status = status_pb2.Status.FromString(raw)
    assert (status.code, status.message) == (8, "full")
    info = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert info.retry_delay.ToMilliseconds() == 1250


def test_strange_metadata_is_no_failure() -> None:
    error = from_grpc(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "m", {"forebay-retry-after-ms": b"binary"}
    )
    assert isinstance(error, errors.Overloaded)
    assert error.retry_after_s == 1.0
