"""Real processes, sockets and /proc."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

from forebay_loadtest import proc

SLEEP = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]


def test_a_stopped_process_is_in_state_t() -> None:
    process = subprocess.Popen(SLEEP, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    assert proc.state(process.pid) in ("S", "R")
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    assert proc.state(process.pid) == "T"
    process.kill()
    process.communicate()
    assert proc.state(process.pid) == ""
    assert proc.rss_bytes(process.pid) == 0


def test_who_listens() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        assert proc.listener(port) is None
        assert not proc.port_open(port)
        server.listen()
        found = proc.listener(port)
        assert found is not None and found.pid == os.getpid()
        assert proc.port_open(port)
    assert proc.listener(port) is None


def test_rss_of_this_process() -> None:
    assert proc.rss_bytes(os.getpid()) > 1 << 20
