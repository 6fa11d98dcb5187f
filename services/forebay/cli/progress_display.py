"""Shows the stages of a start: live on a terminal, line by line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from forebay.deploy.progress import Event, Stage

_TITLES = {
    Stage.MODEL: "Model file",
    Stage.REDIS: "Redis",
    Stage.RAY: "Ray head",
    Stage.WORKERS: "Workers",
    Stage.GATEWAY: "Gateway",
    Stage.STOPPING: "Stopping",
}


@contextmanager
def show_progress(console: Console) -> Iterator[Callable[[Event], None]]:
    if not console.is_terminal:
        yield _LineDisplay(console).notify
        return
    display = _LiveDisplay()
    with Live(get_renderable=display.render, console=console, refresh_per_second=10):
        yield display.notify


def _done_line(event: Event) -> str:
    detail = f"  {event.detail}" if event.detail else ""
    return f"{_TITLES[event.stage]:<10} {event.seconds:5.1f} s{detail}"


class _LineDisplay:
    def __init__(self, console: Console) -> None:
        self._console = console

    def notify(self, event: Event) -> None:
        if event.stage not in _TITLES:
            return
        if event.done:
            self._console.print(_done_line(event))
        elif event.detail or event.stage is Stage.STOPPING:
            self._console.print(f"{_TITLES[event.stage]}: {event.detail or '...'}")


class _LiveDisplay:
    """One line a stage; the one under way has a spinner and its seconds so far."""

    def __init__(self) -> None:
        self._lines: list[Text] = []
        self._current: Event | None = None
        self._began = 0.0
        self._spinner = Spinner("dots")

    def notify(self, event: Event) -> None:
        if event.stage not in _TITLES:
            return
        if event.done:
            self._lines.append(Text("✓ " + _done_line(event)))
            self._current = None
            return
        if self._current is None or self._current.stage is not event.stage:
            self._began = time.monotonic()
        self._current = event

    def render(self) -> RenderableType:
        items: list[RenderableType] = list(self._lines)
        if self._current is not None:
            seconds = time.monotonic() - self._began
            title = f"{_TITLES[self._current.stage]:<10} {seconds:5.1f} s  {self._current.detail}"
            self._spinner.update(text=title)
            items.append(self._spinner)
        return Group(*items)
