"""What travels from the supervisor to `up`, and what Serve's messages are boiled down to."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from forebay.deploy.progress import Event, ProgressWriter, Stage
from forebay.deploy.run_state import LOG_NAME, RAY_LOG_FOLDER
from forebay.deploy.serve_messages import helper_error, root_cause
from forebay.deploy.supervisor import clear_logs


def test_events_travel() -> None:
    out = io.StringIO()
    writer = ProgressWriter(out)
    events = [
        Event(stage=Stage.RAY),
        Event(stage=Stage.RAY, done=True, seconds=1.5, detail="x\ny"),
        Event(stage=Stage.WORKERS, error="broken", log="/logs"),
    ]
    for event in events:
        writer.emit(event)
    assert [Event.parse(line) for line in out.getvalue().splitlines()] == events


def test_a_reader_that_left_is_no_error() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    writer = ProgressWriter(Gone())
    writer.emit(Event(stage=Stage.RAY))
    writer.emit(Event(stage=Stage.RAY))


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        (
            "A replica failed to start with exception. Retrying 2 more time(s). Error:\n"
            "Traceback (most recent call last):\n"
            '  File "x.py", line 1, in f\n'
            "forebay.core.errors.ModelFileError: x.gguf: no such file\n",
            "x.gguf: no such file",
        ),
        ("Error:\nTraceback\n  File\nRuntimeError: out of luck\n\n", "RuntimeError: out of luck"),
        ("The replica died", "The replica died"),
        (
            "A replica failed to start with exception. Error:\nActorDiedError()",
            "its process died; if memory ran out, take fewer workers, a smaller model"
            " or a smaller --kv-memory-mib",
        ),
    ],
)
def test_root_cause(message: str, cause: str) -> None:
    assert root_cause(message) == cause


def test_only_our_own_logs_are_cleared(tmp_path: Path) -> None:
    for name in (LOG_NAME, "gateway.log", "thesis.txt", "notes/a.txt", f"{RAY_LOG_FOLDER}/x.out"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    clear_logs(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {LOG_NAME, "thesis.txt", "notes/a.txt"}
    assert (tmp_path / LOG_NAME).read_text() == ""


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (b'noise\n{"error": "first"}\n{"error": "last"}\n', "last"),
        (b'{"error": "it"}\nTraceback: noise\n', "it"),
        (b'{"detail": "done"}\n', ""),
        (b"[1]\n\xff\n", ""),
        (b"", ""),
    ],
)
def test_the_helpers_last_error(out: bytes, error: str) -> None:
    assert helper_error(out) == error
