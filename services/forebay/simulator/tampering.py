"""Faults of single messages: KV frames and commits that are cut, doubled, late or swapped, answers
that never come, and calls that come twice."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class KvFault(StrEnum):
    TRUNCATED = "truncated"
    DUPLICATED = "duplicated"
    LATE = "late"
    REORDERED = "reordered"
    LOST = "lost"


@dataclass(slots=True, eq=False)
class ArmedKvFault:
    """Hits the first message it may once `skip` others have gone by. commit: only commits (or only
    frames). num_hit: how often it took place."""

    kind: KvFault
    commit: bool
    skip: int
    late_s: float = 0.0
    num_hit: int = 0


@dataclass(slots=True, eq=False)
class LostAnswer:
    """The next answer of a method is not delivered: its caller sees a broken connection, or
    nothing (`silent`) until its deadline."""

    method_name: str
    silent: bool
    num_hit: int = 0


@dataclass(slots=True, eq=False)
class Replay:
    """The next call of a method (a push with all its messages) is made once more, `late_s` after
    its end; nobody waits for the second answer."""

    method_name: str
    late_s: float
    num_hit: int = 0


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as it is delivered, `late_s` later than it would have been. hold: only after
    the message behind it."""

    data: bytes
    late_s: float = 0.0
    hold: bool = False


class Tampering:
    def __init__(self) -> None:
        self._kv: list[ArmedKvFault] = []
        self._answers: list[LostAnswer] = []
        self._replays: list[Replay] = []

    def arm(self, fault: ArmedKvFault | LostAnswer | Replay) -> None:
        match fault:
            case ArmedKvFault():
                self._kv.append(fault)
            case LostAnswer():
                self._answers.append(fault)
            case Replay():
                self._replays.append(fault)

    def replay(self, method_name: str) -> Replay | None:
        for fault in self._replays:
            if fault.method_name == method_name:
                self._replays.remove(fault)
                return fault
        return None

    def deliveries(self, data: bytes) -> list[Delivery]:
        """What becomes of one message of a push."""
        fault = self._hit(data)
        if fault is None:
            return [Delivery(data)]
        match fault.kind:
            case KvFault.TRUNCATED:
                return [Delivery(data[: max(1, len(data) * 2 // 3)])]
            case KvFault.DUPLICATED:
                return [Delivery(data), Delivery(data)]
            case KvFault.LATE:
                return [Delivery(data, late_s=fault.late_s)]
            case KvFault.REORDERED:
                return [Delivery(data, hold=True)]
            case KvFault.LOST:
                return []

    def lost_answer(self, method_name: str) -> LostAnswer | None:
        for fault in self._answers:
            if fault.method_name == method_name:
                self._answers.remove(fault)
                fault.num_hit += 1
                return fault
        return None

    def _hit(self, data: bytes) -> ArmedKvFault | None:
        is_commit = data[:1] == b"\x1a"  # PushRequest.commit, alone in its message
        for fault in self._kv:
            if fault.commit is not is_commit:
                continue
            if fault.skip > 0:
                fault.skip -= 1
                continue
            self._kv.remove(fault)
            fault.num_hit += 1
            return fault
        return None
