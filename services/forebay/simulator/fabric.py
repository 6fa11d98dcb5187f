"""The network between simulated processes: who listens where, how long messages take, and what
goes wrong on the way.

Messages of one call and one direction keep their order; nothing else does. A process that dies
breaks its calls, which peers notice a moment later. A process that is frozen, and a link that is
cut, are silent: messages wait, and a silence longer than `keep_alive_s` breaks the calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from forebay.rpc.connector import Routes
from forebay.simulator.dice import Dice
from forebay.simulator.loop import Node, SimLoop
from forebay.simulator.tampering import Tampering
from forebay.simulator.timeline import Timeline

if TYPE_CHECKING:
    from forebay.simulator.calls import Call

_REFUSE_S = 0.2
"""How long a connection that cannot be made takes to fail."""


@dataclass(slots=True, eq=False)
class Listener:
    node: Node
    handlers: dict[str, Callable[[Any], Any]]


@dataclass(slots=True, eq=False)
class Link:
    """Between two nodes, both ways. held: deliveries that wait for the end of a cut."""

    extra_s: float = 0.0
    is_cut: bool = False
    is_broken: bool = False
    held: list[tuple[Node, Callable[..., object], tuple[Any, ...]]] = field(default_factory=list)
    num_slowed: int = 0
    num_held: int = 0
    num_broken: int = 0


class Network:
    """`on_bug(what, error)` is called for a handler that fails with anything but a
    ForebayError. After `close` nothing is delivered and every call fails at once."""

    def __init__(
        self,
        loop: SimLoop,
        dice: Dice,
        timeline: Timeline,
        latency_s: float,
        keep_alive_s: float,
        on_bug: Callable[[str, Exception], None],
    ) -> None:
        self.loop = loop
        self.dice = dice
        self.timeline = timeline
        self.keep_alive_s = keep_alive_s
        self.on_bug = on_bug
        self.tampering = Tampering()
        self.closed = False
        self.num_messages = 0
        self.num_skewed = 0
        self.num_refused = 0
        self.before_call: dict[str, Callable[[str, Any], Any]] = {}
        """By name of a unary method: (address, request) to the request that is sent there."""
        self.after_call: dict[str, Callable[[Node, Any], None]] = {}
        self.on_push: Callable[[Node, Node], None] | None = None
        self._latency_s = latency_s
        self._listeners: dict[str, Listener] = {}
        self.links: dict[tuple[str, str], Link] = {}
        self._calls: dict[Node, dict[Call, None]] = {}

    def listen(self, address: str, node: Node, routes: Routes) -> None:
        rows = [*routes.unary, *routes.push, *routes.duplex]
        self._listeners[address] = Listener(node, {m.path: handler for m, handler in rows})

    def listener(self, address: str) -> Listener | None:
        return None if self.closed else self._listeners.get(address)

    def link(self, one: Node, other: Node) -> Link:
        names = sorted((one.name, other.name))
        return self.links.setdefault((names[0], names[1]), Link())

    def close(self) -> None:
        self.closed = True

    def begin(self, call: Call) -> None:
        for node in (call.client, call.server):
            if node is not None:
                self._calls.setdefault(node, {})[call] = None

    def end(self, call: Call, node: Node) -> None:
        """One end of the call is done with it."""
        self._calls.get(node, {}).pop(call, None)

    def num_calls(self, node: Node) -> int:
        return len(self._calls.get(node, ()))

    def refuse(self, node: Node, callback: Callable[..., object], *args: Any) -> None:
        """Calls back after the time that a failing connect takes."""
        delay = 0.0 if self.closed else _REFUSE_S * self.dice.between(0.05, 1)
        self.loop.call_node(node, self.loop.now + delay, callback, *args)

    def send(
        self,
        sender: Node,
        receiver: Node,
        not_before: float,
        callback: Callable[..., object],
        *args: Any,
    ) -> float:
        """Has `callback(*args)` run on the receiver when the message arrives; returns when that
        is. `not_before`: the arrival of what was sent before it."""
        loop = self.loop
        if self.closed:
            return not_before
        self.num_messages += 1
        if sender.offset != receiver.offset:
            self.num_skewed += 1
        arrival = loop.now + self._latency_s * self.dice.between(1, 2)
        if self.links:
            link = self.links.get(
                (sender.name, receiver.name)
                if sender.name < receiver.name
                else (receiver.name, sender.name)
            )
            if link is not None:
                if link.is_cut:
                    link.num_held += 1
                    link.held.append((receiver, callback, args))
                    return not_before
                if link.extra_s:
                    link.num_slowed += 1
                    arrival += link.extra_s * self.dice.between(0.5, 1)
        arrival = max(arrival, not_before)
        loop.call_node(receiver, arrival, callback, *args)
        return arrival

    def kill(self, node: Node) -> int:
        """The process is gone: nobody listens, and its calls break. Returns how many did."""
        self._listeners = {a: row for a, row in self._listeners.items() if row.node is not node}
        calls = list(self._calls.pop(node, {}))
        for call in calls:
            self.break_call(call, "the connection was reset")
        return len(calls)

    def stop_listening(self, node: Node) -> None:
        """In order: calls under way go on."""
        self._listeners = {a: row for a, row in self._listeners.items() if row.node is not node}

    def break_call(self, call: Call, reason: str) -> None:
        """Both ends learn of it a moment later, unless they are dead."""
        if self.closed:
            return
        for node, callback in (
            (call.client, call.client_broken),
            (call.server, call.server_broken),
        ):
            if node is not None:
                self.end(call, node)
            if node is not None and not node.dead:
                at = self.loop.now + self._latency_s * self.dice.between(1, 2)
                self.loop.call_node(node, at, callback, reason)

    def calls_between(self, one: Node, other: Node, method_name: str) -> list[Call]:
        return [
            call
            for call in self._calls.get(one, {})
            if call.method.name == method_name and {one, other} == {call.client, call.server}
        ]

    def break_calls(self, node: Node, reason: str) -> int:
        calls = list(self._calls.get(node, {}))
        for call in calls:
            self.break_call(call, reason)
        return len(calls)

    def cut(self, one: Node, other: Node) -> Link:
        """Silence from now on; after `keep_alive_s` of it the calls between the two break and new
        ones fail, until `heal`."""
        link = self.link(one, other)
        link.is_cut = True
        at = self.loop.now + self.keep_alive_s
        self.loop.call_node(self.loop.world, at, self._give_up, link, one, other)
        return link

    def _give_up(self, link: Link, one: Node, other: Node) -> None:
        if not link.is_cut:
            return
        link.is_broken = True
        link.held.clear()
        calls = {**self._calls.get(one, {}), **self._calls.get(other, {})}
        for call in calls:
            if {one, other} == {call.client, call.server}:
                link.num_broken += 1
                self.break_call(call, "keep-alive ran out")

    def heal(self, link: Link) -> None:
        link.is_cut = link.is_broken = False
        held, link.held = link.held, []
        at = self.loop.now
        for receiver, callback, args in held:
            at += self._latency_s * self.dice.between(0.1, 1)
            self.loop.call_node(receiver, at, callback, *args)
