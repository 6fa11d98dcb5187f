"""The whole network for a test of a few parts: one line to make it, no faults but an unplugged
listener."""

from __future__ import annotations

import asyncio

from forebay.core.errors import InternalError
from forebay.core.randomness import Rng
from forebay.rpc.connector import Channel, Routes
from forebay.simulator.channel import SimConnector
from forebay.simulator.dice import Dice
from forebay.simulator.fabric import Network
from forebay.simulator.loop import Node, SimLoop
from forebay.simulator.timeline import Timeline

KEEP_ALIVE_S = 15.0


class SimNetwork:
    """Implements `Connector`, for callers that are no node of their own. Every message takes
    `latency_s`, and up to as much again by chance. Use it inside `loop.run`."""

    def __init__(self, rng: Rng, latency_s: float) -> None:
        self._seed = rng.seed64()
        self._latency_s = latency_s
        self._network: Network | None = None
        self._nodes: dict[str, Node] = {}

    @property
    def network(self) -> Network:
        if self._network is None:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, SimLoop)
            self._network = Network(
                loop, Dice(self._seed), Timeline(False), self._latency_s, KEEP_ALIVE_S, _fail
            )
        return self._network

    def listen(self, address: str, routes: Routes) -> None:
        self._nodes[address] = self.network.loop.new_node(address)
        self.network.listen(address, self._nodes[address], routes)

    def unplug(self, address: str) -> None:
        """The listener and every call to it end at once, as when a process dies."""
        self.network.kill(self._nodes.pop(address))

    def connect(self, address: str) -> Channel:
        network = self.network
        return SimConnector(network, network.loop.world).connect(address)


def _fail(what: str, error: Exception) -> None:
    raise InternalError(f"{what} failed") from error
