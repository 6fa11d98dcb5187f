"""What a gateway's index says, held against what the workers really hold."""

from __future__ import annotations

from forebay.simulator.processes import GatewayProcess, WorkerProcess


def disagreement(gateway: GatewayProcess, workers: list[WorkerProcess]) -> str:
    """Of workers that the gateway knows; empty when there is none. Call it at the end, when nothing
    changes any more."""
    router = gateway.service.router
    links = gateway.service._fleet._links
    pools = {
        process.worker.worker_id: set(process.worker.engine.pool.hashes())
        for process in workers
        if (process.worker.worker_id, process.worker.epoch) in links
    }
    for worker_id in pools:
        if not router.follower.is_fresh(worker_id):
            return f"{gateway.node.name} is not in step with {worker_id}"
    blocks = sorted({block for pool in pools.values() for block in pool})
    holders = router.index.holders(blocks)
    for worker_id, pool in pools.items():
        slot = router.index.slot_of(worker_id)
        assert slot is not None
        for block, bits in zip(blocks, holders, strict=True):
            if bits >> slot & 1 != (block in pool):
                says = "misses a block that is" if block in pool else "finds a block that is not"
                return f"{gateway.node.name} {says} on {worker_id}"
    return ""
