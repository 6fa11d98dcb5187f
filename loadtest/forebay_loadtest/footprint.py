"""What a platform holds: requests in the gateway's counts, memory of every process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import httpx

from forebay.deploy.status import PlatformStatus
from forebay_loadtest import proc
from forebay_loadtest.local_platform import LocalPlatform

Sizes = Mapping[str, Sequence[int]]
"""Bytes of resident memory: of the gateway, and of each pool's workers by address."""


def rss_by_role(platform: LocalPlatform, status: PlatformStatus) -> Sizes:
    ports = {"gateway": [platform.http_port]}
    for item in sorted(status.workers, key=lambda item: item.address):
        ports.setdefault(item.role, []).append(int(item.address.rpartition(":")[2]))
    found = {role: [proc.listener(port) for port in each] for role, each in ports.items()}
    return {
        role: [proc.rss_bytes(item.pid) for item in each if item is not None]
        for role, each in found.items()
    }


def growth(before: Sizes, after: Sizes) -> int:
    """Bytes by which the process grew that grew most; of the same processes, before and after."""
    return max(
        new - old for role in before for old, new in zip(before[role], after[role], strict=True)
    )


def mib(sizes: Sizes) -> dict[str, list[int]]:
    return {role: [size >> 20 for size in each] for role, each in sizes.items()}


def shown(sizes: Sizes) -> str:
    parts = {role: ", ".join(str(size) for size in each) for role, each in mib(sizes).items()}
    return "; ".join(f"{role} {each}" for role, each in parts.items())


async def busy_requests(platform: LocalPlatform) -> int:
    """Requests that run or wait by the gateway's own count."""
    async with httpx.AsyncClient(trust_env=False) as http:
        lines = (await http.get(f"{platform.url}/metrics")).text.splitlines()
    names = ("forebay_num_requests_running", "forebay_num_requests_waiting")
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith(names)))
