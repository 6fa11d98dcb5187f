"""What /proc says of processes on this machine: state, memory, who listens where."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from forebay.deploy.processes import ProcessRecord

_LISTEN = "0A"
KIB = 1024


def state(pid: int) -> str:
    """proc(5): R, S, D, T (stopped), Z ...; empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return text.rpartition(")")[2].split()[0]


def rss_bytes(pid: int) -> int:
    """0 when there is no such process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * KIB for line in lines if line.startswith("VmRSS:")), 0)


def listener(port: int) -> ProcessRecord | None:
    """The process that listens on TCP `port`, None when nobody does."""
    wanted = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    if not wanted:
        return None
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and wanted & _open_files(entry / "fd"):
            return ProcessRecord.of(int(entry.name))
    return None


def port_open(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _listening_inodes(port: int) -> set[str]:
    """proc_pid_net(5): fields 2 (local address), 4 (state) and 10 (inode)."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(fields[9])
    return found


def _open_files(folder: Path) -> set[str]:
    """Targets of a process's file descriptors; empty when they cannot be read."""
    found = set()
    try:
        for entry in os.scandir(folder):
            try:
                found.add(os.readlink(entry.path))
            except OSError:
                continue
    except OSError:
        return set()
    return found
