"""How a simulated Redis is asked: straight, or through the network."""

from __future__ import annotations

from typing import Any, Protocol

from forebay.core.clock import Deadline
from forebay.core.errors import DeadlineExceeded, ForebayError, Unavailable
from forebay.rpc.connector import Connector, Method, Routes

REDIS_ADDRESS = "redis:1"
TIMEOUT_S = 2.0
"""As in the store over a real one."""


def redis_method(name: str) -> Method[Any, Any]:
    """Messages are tuples of immutable values, sent as they are."""
    return Method("redis", name, _identity, _identity, _identity, _identity)


class RedisClient(Protocol):
    async def call(self, method: Method[Any, Any], message: Any, wait_s: float = 0.0) -> Any:
        """`wait_s`: how long Redis is to wait. Raises Unavailable."""

    async def close(self) -> None: ...


class LocalRedisClient:
    """Implements `RedisClient` for a Redis that answers at once and never fails."""

    def __init__(self, routes: Routes) -> None:
        self._handlers = {method.name: handler for method, handler in routes.unary}

    async def call(self, method: Method[Any, Any], message: Any, wait_s: float = 0.0) -> Any:
        return await self._handlers[method.name](message)

    async def close(self) -> None:
        """Nothing is open."""


class SimRedisClient:
    """Implements `RedisClient` for the Redis that listens on REDIS_ADDRESS. `num_failures`: calls
    it had no answer to."""

    def __init__(self, connector: Connector) -> None:
        self.num_failures = 0
        self._channel = connector.connect(REDIS_ADDRESS)

    async def call(self, method: Method[Any, Any], message: Any, wait_s: float = 0.0) -> Any:
        try:
            return await self._channel.unary(method, message, Deadline.after(TIMEOUT_S + wait_s))
        except DeadlineExceeded as error:
            self.num_failures += 1
            raise Unavailable(f"Redis did not answer within {TIMEOUT_S:.0f} s") from error
        except ForebayError as error:
            self.num_failures += 1
            raise Unavailable(f"Redis: {error.message}") from error

    async def close(self) -> None:
        await self._channel.close()


def _identity(message: Any) -> Any:
    return message
