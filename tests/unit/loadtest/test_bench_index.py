"""The benchmark of the index, small."""

from __future__ import annotations

import random

from forebay_loadtest.routing.call_times import CallTimes
from forebay_loadtest.routing.index_bounds import endless_prompts, exact_lru_hits
from forebay_loadtest.routing.index_size import FullIndex


def test_call_times_give_results_and_quantiles() -> None:
    times = CallTimes()
    assert [times.call(lambda n=n: n * n) for n in range(5)] == [0, 1, 4, 9, 16]
    figures = times.as_json()
    assert figures["calls"] == 5
    for kind in ("ms", "cpu_ms"):
        assert 0 <= figures[f"p50_{kind}"] <= figures[f"p99_{kind}"] <= figures[f"max_{kind}"]


def test_an_exact_lru_loses_the_ends_of_chains_first() -> None:
    a, b = [b"0", b"1", b"2"], [b"0", b"3"]
    assert exact_lru_hits([a, a], capacity=3) == 3
    assert exact_lru_hits([a, b, a], capacity=3) == 1 + 2
    assert exact_lru_hits([a, b, a, b], capacity=4) == 1 + 3 + 2


def test_endless_prompts_stay_within_the_bound() -> None:
    figures = endless_prompts(random.Random(1), 1 << 18, 10, 20_000)
    assert figures["within_bound"]
    kept, evicted, stored = (figures[k] for k in ("blocks_kept", "evictions", "blocks_stored"))
    assert kept + evicted == stored > 20_000


def test_a_full_index_is_filled_churned_and_swept() -> None:
    full = FullIndex(random.Random(1), 64, 1 << 22)
    memory = full.fill(5000)
    assert memory["blocks"] == full.index.num_blocks >= 5000
    full.churn(512)
    assert full.index.num_blocks == memory["blocks"]
    swept = full.sweep(64, 4096)
    assert swept["blocks_freed"] == memory["blocks"]
    full.index.check_integrity()
