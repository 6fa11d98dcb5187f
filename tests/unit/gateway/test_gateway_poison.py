"""Blocked requests: at once here, soon everywhere, and not for ever."""

from __future__ import annotations

import asyncio

import pytest

from forebay.core.errors import InvalidRequest, Unavailable
from forebay.gateway.poison import POLL_S, PoisonList
from forebay.simulator import loop


class Registry:
    def __init__(self) -> None:
        self.away = False
        self.listed: list[str] = []

    async def add_poison(self, fingerprint: str, ttl_s: float) -> None:
        if self.away:
            raise Unavailable("no Redis")
        self.listed.append(fingerprint)

    async def list_poison(self) -> list[str]:
        if self.away:
            raise Unavailable("no Redis")
        return list(self.listed)


def new_list(registry: Registry, salt: bytes = b"salt") -> PoisonList:
    return PoisonList(registry, salt, ttl_s=60)  # type: ignore[arg-type]


def is_blocked(poison: PoisonList, fingerprint: str) -> bool:
    try:
        poison.check(fingerprint)
    except InvalidRequest as error:
        assert error.code == "poisoned_request"
        return True
    return False


def test_fingerprints_tell_requests_apart() -> None:
    poison = new_list(Registry())
    seen = {
        poison.fingerprint("m", [1, 2]),
        poison.fingerprint("m", [1, 3]),
        poison.fingerprint("m", [1, 2, 0]),
        poison.fingerprint("n", [1, 2]),
        new_list(Registry(), b"other").fingerprint("m", [1, 2]),
    }
    assert len(seen) == 5
    assert poison.fingerprint("m", [1, 2]) == new_list(Registry()).fingerprint("m", (1, 2))


@pytest.mark.parametrize("away_first", [False, True])
def test_one_gateway_blocks_for_all(away_first: bool) -> None:
    async def main() -> None:
        registry = Registry()
        one, other = new_list(registry), new_list(registry)
        tasks = [asyncio.create_task(poison.run()) for poison in (one, other)]
        registry.away = away_first
        await asyncio.sleep(0.5)
        one.add("f")
        assert is_blocked(one, "f") and not is_blocked(other, "f")
        await asyncio.sleep(5)
        assert is_blocked(other, "f") is not away_first
        registry.away = False
        await asyncio.sleep(3 * POLL_S)
        assert is_blocked(other, "f") and is_blocked(one, "f")
        assert registry.listed == ["f"]
        assert not is_blocked(one, "g")
        registry.listed.clear()
        await asyncio.sleep(60 + POLL_S)
        assert not is_blocked(one, "f") and not is_blocked(other, "f")
        for task in tasks:
            assert not task.done()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    loop.run(main())
