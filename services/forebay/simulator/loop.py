"""An asyncio event loop in virtual time, shared by all simulated processes.

When nothing is ready the clock jumps to the next timer. Every callback belongs to a *node*, a
simulated process, found in a context variable that tasks inherit. A node can be killed (its
callbacks never run again and no `finally` block does, as after SIGKILL), frozen and thawed (its
callbacks wait and its timers come late, as after SIGSTOP), and has a clock of its own, which may
be hours off the others'. There are no sockets, pipes or other threads.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from forebay.core.errors import InternalError

T = TypeVar("T")

_ROUND = 1000
"""Callbacks after which the loop looks whether it should go on."""


class Deadlock(InternalError):
    """Every task waits for something, and no timer is left to wake one."""


class Livelock(InternalError):
    """Tasks wake each other without end, or far more often than any run needs."""


class Node:
    """One simulated process. offset: its clock minus the simulation's, in seconds.
    after_event: called after each of its callbacks. held: callbacks it would run if it could."""

    __slots__ = ("after_event", "context", "dead", "held", "name", "offset", "running")

    def __init__(self, name: str, offset: float = 0.0) -> None:
        self.name = name
        self.offset = offset
        self.running = True
        self.dead = False
        self.held: list[SimHandle] = []
        self.after_event: Callable[[], None] | None = None
        self.context = contextvars.Context()
        self.context.run(_NODE.set, self)

    def __repr__(self) -> str:
        return f"<node {self.name}>"


_NODE: contextvars.ContextVar[Node] = contextvars.ContextVar("node")


class SimHandle(asyncio.TimerHandle):
    """Also for callbacks without a time. `_when` is in the simulation's own time."""

    __slots__ = ("node",)

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context,
        node: Node,
    ) -> None:
        self._when = when
        self._callback = callback
        self._args = args
        self._context = context
        self._cancelled = False
        self.node = node

    def cancel(self) -> None:
        self._cancelled = True
        self._callback = self._args = None  # type: ignore[assignment]

    def when(self) -> float:
        """On the node's clock."""
        return self._when + self.node.offset


class SimLoop(asyncio.base_events.BaseEventLoop):
    """`now` is the simulation's time; it starts at 0. `time()` is that of the running node. Raises
    Livelock after `max_events`."""

    _stopping: bool

    def __init__(self, max_events: int | None = None) -> None:
        super().__init__()
        self.now = 0.0
        self._max_events = max_events
        self.num_events = 0
        self.world = Node("world")
        """Belongs to no process: scenarios, clients' hands, the network."""
        self._node = self.world
        self._callbacks: deque[SimHandle] = deque()
        self._timers: list[tuple[float, int, SimHandle]] = []
        self._num_timers = 0
        self.nodes: list[Node] = [self.world]
        self._tasks: list[asyncio.Task[Any]] = []
        self._prune_at = 1024

    @property
    def node(self) -> Node:
        """Whose callback runs."""
        return self._node

    def new_node(self, name: str, offset: float = 0.0) -> Node:
        node = Node(name, offset)
        self.nodes.append(node)
        return node

    def kill(self, node: Node) -> None:
        node.running = False
        node.dead = True

    def freeze(self, node: Node) -> None:
        node.running = False

    def thaw(self, node: Node) -> int:
        """How many callbacks had to wait."""
        assert not node.dead
        node.running = True
        num_held = len(node.held)
        self._callbacks.extend(node.held)
        node.held.clear()
        return num_held

    def spawn(self, node: Node, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts a task in a node."""
        return self.create_task(work, context=node.context.copy())

    def call_node(
        self, node: Node, when: float, callback: Callable[..., object], *args: Any
    ) -> SimHandle:
        """`when`: in the simulation's time."""
        handle = SimHandle(when, callback, args, node.context, node)
        self._push(handle)
        return handle

    def time(self) -> float:
        return self.now + self._node.offset

    def call_soon(  # type: ignore[override]
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> SimHandle:
        if context is None:
            context = contextvars.copy_context()
            node = self._node
        else:
            node = context.get(_NODE, self.world)
        handle = SimHandle(0.0, callback, args, context, node)
        self._callbacks.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]
    """For the finalizers of asynchronous generators: nothing here knows another thread."""

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> SimHandle:
        return self._call_at(self.now + delay, callback, args, context)

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> SimHandle:
        return self._call_at(when - self._node.offset, callback, args, context)

    def _call_at(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context | None,
    ) -> SimHandle:
        if context is None:
            context = contextvars.copy_context()
        handle = SimHandle(when, callback, args, context, self._node)
        self._push(handle)
        return handle

    def _push(self, handle: SimHandle) -> None:
        self._num_timers += 1
        heapq.heappush(self._timers, (handle._when, self._num_timers, handle))

    def create_task(  # type: ignore[override]
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[T]:
        task: asyncio.Task[T] = asyncio.Task(coro, loop=self, name=name, context=context)
        if len(self._tasks) >= self._prune_at:
            self._tasks = [known for known in self._tasks if self._goes_on(known)]
            self._prune_at = 1024 + len(self._tasks)
        self._tasks.append(task)
        return task

    def _goes_on(self, task: asyncio.Task[Any]) -> bool:
        """Tells of an exception that nobody has taken from a task that has ended."""
        if not task.done():
            return True
        if not task.cancelled() and getattr(task, "_log_traceback", False):
            context = {"message": "nobody took a task's exception", "exception": task.exception()}
            self.call_exception_handler(context)
        return False

    def _run_once(self) -> None:
        callbacks = self._callbacks
        if not callbacks:
            self._jump()
        if self._max_events is not None and self.num_events > self._max_events:
            self._max_events = None
            raise Livelock(f"{self.num_events} events, and no end")
        for _ in range(_ROUND):
            if not callbacks or self._stopping:
                break
            handle = callbacks.popleft()
            if handle._cancelled:
                continue
            node = handle.node
            if not node.running:
                node.held.append(handle)
                continue
            self._node = node
            self.num_events += 1
            try:
                handle._context.run(handle._callback, *handle._args)
                if node.after_event is not None:
                    node.after_event()
            except Exception as error:
                self.call_exception_handler({"message": "a callback failed", "exception": error})
        self._node = self.world

    def _jump(self) -> None:
        """Makes the next timer, and all others of that instant, ready."""
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not timers:
            raise Deadlock("every task waits, and no timer is left")
        self.now = max(self.now, timers[0][0])
        while timers and timers[0][0] <= self.now:
            handle = heapq.heappop(timers)[2]
            if not handle._cancelled:
                self._callbacks.append(handle)

    def end_all_tasks(self) -> None:
        """Wakes what was killed or frozen and cancels every task, the oldest first: nothing may
        be left to a garbage collector. Close the network before."""
        for node in self.nodes:
            node.after_event = None
            node.dead = False
            self.thaw(node)
        while tasks := [task for task in self._tasks if self._goes_on(task)]:
            for task in tasks:
                task.cancel()
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.run_until_complete(self.shutdown_asyncgens())
        self._tasks.clear()
        self._timers.clear()


def run(main: Coroutine[Any, Any, T], loop: SimLoop | None = None) -> T:
    """Runs `main` to its end in virtual time. Raises Deadlock."""
    loop = SimLoop() if loop is None else loop
    asyncio.set_event_loop(loop)
    try:
        try:
            return loop.run_until_complete(main)
        finally:
            loop.end_all_tasks()
    finally:
        asyncio.set_event_loop(None)
        loop.close()
