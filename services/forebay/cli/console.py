"""How commands find the platform and write to the terminal."""

from __future__ import annotations

from typing import TypeVar

import click

from forebay.core.errors import Unavailable
from forebay.core.settings import state_dir
from forebay.deploy.run_state import RunState, read_run_state

_Command = TypeVar("_Command")

address_option = click.option(
    "--address",
    metavar="HOST:PORT",
    help="gRPC address of a gateway; by default that of the platform on this machine.",
)


def running_platform() -> RunState:
    """Raises Unavailable when none runs on this machine."""
    state = read_run_state(state_dir())
    if state is None or not state.alive:
        raise Unavailable("no platform runs here; `forebay up` starts one")
    return state


def gateway_address(address: str | None) -> str:
    return address if address is not None else running_platform().grpc_address
