"""Finding and ending the platform's own processes, and never anyone else's. Linux only.

A process counts as ours when its id and its start time are the recorded ones, when it descends
from the supervisor, or when its environment carries the platform's random instance id. Process
ids alone prove nothing: the system reuses them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

INSTANCE_VARIABLE = "FOREBAY_INSTANCE"
KILL_LIMIT_S = 5.0
"""How long a killed process may take to vanish."""

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """`started`: clock ticks between boot and the process's start, which no clock change moves."""

    pid: int
    started: int
    name: str

    @classmethod
    def of(cls, pid: int) -> ProcessRecord | None:
        """None when there is no such process, or only its zombie."""
        stat = _read_stat(pid)
        return None if stat is None or stat.is_zombie else stat.record()

    @property
    def alive(self) -> bool:
        stat = _read_stat(self.pid)
        return stat is not None and not stat.is_zombie and stat.started == self.started

    def signal(self, number: signal.Signals) -> None:
        """Nothing happens when the process has ended, or when its id is another's by now."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.alive:
                signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return
        finally:
            os.close(handle)


@dataclass(frozen=True, slots=True)
class _Stat:
    pid: int
    parent: int
    state: str
    started: int
    name: str

    @property
    def is_zombie(self) -> bool:
        return self.state in "ZX"

    def record(self) -> ProcessRecord:
        return ProcessRecord(self.pid, self.started, self.name)


def _read_stat(pid: int) -> _Stat | None:
    """proc(5), fields 2 to 4 and 22 of /proc/PID/stat. The name may hold spaces and brackets."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    head, _, tail = text.rpartition(")")
    rest = tail.split()
    return _Stat(pid, int(rest[1]), rest[0], int(rest[19]), head.partition("(")[2])


def _all_stats() -> Iterator[_Stat]:
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (stat := _read_stat(int(entry))) is not None:
            yield stat


def become_subreaper() -> None:
    """From now on orphaned descendants become this process's children, not init's."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def reap_adopted(managed: Iterable[int]) -> None:
    """Collects exited children that came here as orphans; `managed` are reaped by others."""
    skip = set(managed)
    for stat in _all_stats():
        if stat.parent == os.getpid() and stat.is_zombie and stat.pid not in skip:
            os.waitpid(stat.pid, os.WNOHANG)


def reap_all() -> None:
    """Collects every exited child; for the end, when nobody else waits for any."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0] != 0:
            pass


def descendants(pid: int) -> list[ProcessRecord]:
    """Children before grandchildren; no zombies."""
    children: dict[int, list[_Stat]] = {}
    for stat in _all_stats():
        children.setdefault(stat.parent, []).append(stat)
    found: list[_Stat] = list(children.get(pid, ()))
    for stat in found:
        found.extend(children.get(stat.pid, ()))
    return [stat.record() for stat in found if not stat.is_zombie]


def marked(instance: str) -> list[ProcessRecord]:
    """All processes that carry the instance id in their environment, but for the caller."""
    entry = f"{INSTANCE_VARIABLE}={instance}".encode()
    found = []
    for stat in _all_stats():
        if stat.is_zombie or stat.pid == os.getpid():
            continue
        try:
            environ = Path(f"/proc/{stat.pid}/environ").read_bytes()
        except OSError:
            continue
        if entry in environ.split(b"\0"):
            found.append(stat.record())
    return found


def command_of(record: ProcessRecord) -> tuple[list[str], dict[str, str]]:
    """Command line and environment that the process was started with."""
    folder = Path(f"/proc/{record.pid}")
    arguments = (folder / "cmdline").read_bytes().split(b"\0")[:-1]
    pairs = (item.partition(b"=") for item in (folder / "environ").read_bytes().split(b"\0"))
    environ = {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs if name}
    return [os.fsdecode(argument) for argument in arguments], environ


def end_processes(records: Iterable[ProcessRecord], grace_s: float) -> list[ProcessRecord]:
    """SIGTERM, and SIGKILL for what is left after `grace_s`. Returns what outlived even that."""
    pending = [record for record in records if record.alive]
    for record in pending:
        record.signal(signal.SIGTERM)
    pending = wait_gone(pending, grace_s)
    for record in pending:
        record.signal(signal.SIGKILL)
    return wait_gone(pending, KILL_LIMIT_S)


def wait_gone(records: list[ProcessRecord], limit_s: float) -> list[ProcessRecord]:
    """What is still alive when all are gone or the time is up."""
    end = time.monotonic() + limit_s
    while records and time.monotonic() < end:
        time.sleep(_POLL_S)
        records = [record for record in records if record.alive]
    return records
