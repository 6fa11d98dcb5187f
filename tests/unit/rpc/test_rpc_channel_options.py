"""gRPC ignores an option whose name it does not know: keep-alive pings once met a server that, for
a misspelt name, still had its default and cut every quiet connection after 40 s."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpc._cython import cygrpc

from forebay.rpc.grpc_connector import CHANNEL_OPTIONS
from forebay.rpc.grpc_listener import SERVER_OPTIONS


@pytest.fixture(scope="module")
def core() -> bytes:
    return Path(cygrpc.__file__).read_bytes()


@pytest.mark.parametrize("name", sorted({n for n, _ in (*CHANNEL_OPTIONS, *SERVER_OPTIONS)}))
def test_grpc_knows_the_option(core: bytes, name: str) -> None:
    assert name.encode() + b"\0" in core


def test_a_server_allows_the_pings_of_our_channels() -> None:
    channel, server = dict(CHANNEL_OPTIONS), dict(SERVER_OPTIONS)
    allowed = server["grpc.http2.min_ping_interval_without_data_ms"]
    assert channel["grpc.keepalive_time_ms"] > allowed
