"""`python -m forebay_loadtest.kernels_cpu`: the CPU's kv_pack and kv_unpack against a memory copy
of the same bytes and against torch."""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from crc32c import crc32c
from torch import Tensor

from forebay_kernels import native, ops
from forebay_loadtest.report import environment

_COPY_SHARE = 0.8
_TORCH_PACE = 5.0


@dataclass(frozen=True, slots=True)
class Contest:
    """Two ways to the same result. at_least: of the peer's time over ours; None: for reading."""

    name: str
    ours: Callable[[], object]
    peer_name: str
    peer: Callable[[], object]
    num_bytes: int
    at_least: float | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a request's KV and of the cache it is in."""

    layers: int
    heads: int
    head_dim: int
    block_size: int
    num_blocks: int

    def cache(self, generator: torch.Generator, *, head_major: bool = False) -> Tensor:
        """bf16, key and value; as blocks of [slot, head] or of [head, slot]."""
        inner = (self.heads, self.block_size) if head_major else (self.block_size, self.heads)
        sizes = (self.layers, 2, self.num_blocks, *inner, self.head_dim)
        cache = torch.empty(sizes, dtype=torch.bfloat16)
        cache.view(torch.int16).random_(generator=generator)
        return cache.view(torch.int16).bitwise_and_(~0x4000).view(torch.bfloat16)  # all finite


@click.command()
@click.option("--tokens", default=4000, show_default=True, type=click.IntRange(64))
@click.option("--layers", default=30, show_default=True, type=click.IntRange(1))
@click.option("--heads", default=3, show_default=True, type=click.IntRange(2))
@click.option("--head-dim", default=64, show_default=True, type=click.IntRange(8))
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--repeats", default=15, show_default=True, type=click.IntRange(3))
@click.option("--seed", default=0, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON here.")
def main(
    tokens: int,
    layers: int,
    heads: int,
    head_dim: int,
    threads: int,
    repeats: int,
    seed: int,
    output: Path | None,
) -> None:
    """Exits with 1 when something falls short. Medians, both sides by turns with as many threads.
    With one thread CPU time is judged, which other work on the machine stretches less than the
    clock's; with more threads the clock."""
    torch.set_num_threads(threads)
    library = native.libraries.of("cpu")
    load = os.getloadavg()[0]
    generator = torch.Generator().manual_seed(seed)
    block_size = 16
    num_blocks = -(-tokens // block_size) * 5 // 4
    shape = Shape(layers, heads, head_dim, block_size, num_blocks)
    click.echo(
        f"{tokens} tokens of {layers} layers x {heads} heads x {head_dim}, bf16, {threads} threads,"
        f" {'plain torch' if library is None else library.variant}, load of the machine {load:.1f}"
    )
    rows: list[dict[str, Any]] = []
    for contests in (_copies, _layouts, _codecs):
        for contest in contests(shape, tokens, generator):
            rows.append(_measure(contest, repeats, threads))
            click.echo(_line(rows[-1]))
    _write(output, rows, {"threads": threads, "load_average": round(load, 2), "seed": seed})
    held = {_verdict(row): row["ratio"] >= row["at_least"] for row in rows if row["at_least"]}
    short = [text for text, ok in held.items() if not ok]
    click.echo(f"{'SHORT' if short else 'OK'}: {'; '.join(short or held)}")
    sys.exit(1 if short else 0)


def _copies(shape: Shape, tokens: int, generator: torch.Generator) -> list[Contest]:
    """Blocks of a cache in any order to the wire and back, against one stretch of memory."""
    cache, table = shape.cache(generator), _table(shape, tokens, generator)
    size = _payload_bytes(shape, shape.heads, tokens, "raw")
    payload = torch.zeros(size, dtype=torch.uint8)
    source = torch.ones(size, dtype=torch.uint8)
    target, back = torch.zeros_like(source), torch.zeros_like(cache)
    row = _payload_bytes(shape, shape.heads, 1, "raw") // shape.layers
    each = max(1, (1 << 20) // row)
    frames = [
        (layer, start, min(each, tokens - start))
        for layer in range(shape.layers)
        for start in range(0, tokens, each)
    ]

    def pack_frames() -> None:
        for layer, start, count in frames:
            out = payload[: count * row]
            ops.kv_pack(cache[layer : layer + 1], table, start, count, out)

    def unpack_frames() -> None:
        for layer, start, count in frames:
            frame = payload[: count * row]
            ops.kv_unpack(frame, back[layer : layer + 1], table, start, count)

    def copy_frames() -> None:
        at = 0
        for _, _, count in frames:
            target[: count * row].copy_(source[at : at + count * row])
            at += count * row

    def pack() -> None:
        ops.kv_pack(cache, table, 0, tokens, payload)

    def unpack() -> None:
        ops.kv_unpack(payload, back, table, 0, tokens)

    def copy() -> None:
        target.copy_(source)

    pack()
    name = f"in frames of {each * row / (1 << 20):.1f} MiB"
    return [
        Contest("pack raw", pack, "memory copy", copy, size, _COPY_SHARE),
        Contest("unpack raw", unpack, "memory copy", copy, size, _COPY_SHARE),
        Contest(f"pack raw {name}", pack_frames, "memory copy", copy_frames, size),
        Contest(f"unpack raw {name}", unpack_frames, "memory copy", copy_frames, size),
    ]


def _layouts(shape: Shape, tokens: int, generator: torch.Generator) -> list[Contest]:
    """Where the cache's order is not the wire's: torch gathers or scatters and permutes, and what
    it moved is checked as ours is."""
    table = _table(shape, tokens, generator)
    ids = torch.tensor(table)
    cache = shape.cache(generator, head_major=True)
    kept = shape.heads // 2
    contests = []
    for name, part in (
        ("head-major", cache),
        (f"{kept} of {shape.heads} heads, head-major", cache.narrow(3, shape.heads - kept, kept)),
    ):
        contests += _both_ways(name, part, ids, table, tokens)
    return contests


def _both_ways(
    name: str, cache: Tensor, ids: Tensor, table: list[int], tokens: int
) -> list[Contest]:
    """cache: [L, 2, num_blocks, H, block_size, D]."""
    layers, planes, _, heads, block_size, width = cache.shape
    size = ops.payload_bytes(layers, planes, tokens, heads, width, 2, "raw")
    payload = torch.zeros(size, dtype=torch.uint8)
    rows = payload.view(torch.bfloat16).view(layers, planes, tokens, heads, width)
    full = tokens // block_size  # index_copy_ knows whole blocks only

    def gather() -> None:
        blocks = cache.index_select(2, ids).permute(0, 1, 2, 4, 3, 5)
        rows.copy_(blocks.flatten(2, 3).narrow(2, 0, tokens))

    def scatter() -> None:
        blocks = rows[:, :, : full * block_size].unflatten(2, (full, block_size))
        cache.index_copy_(2, ids[:full], blocks.permute(0, 1, 2, 4, 3, 5))

    def checked(run: Callable[[], None]) -> Callable[[], None]:
        def run_and_check() -> None:
            run()
            crc32c(payload.numpy().data)

        return run_and_check

    def pack() -> None:
        ops.kv_pack(cache.transpose(3, 4), table, 0, tokens, payload)

    def unpack() -> None:
        ops.kv_unpack(payload, cache.transpose(3, 4), table, 0, tokens)

    to_wire, to_cache = "index_select + permute", "permute + index_copy_"
    return [
        Contest(f"pack {name}", pack, f"{to_wire} + crc32c", checked(gather), size, _TORCH_PACE),
        Contest(f"pack {name}", pack, to_wire, gather, size),
        Contest(
            f"unpack {name}", unpack, f"{to_cache} + crc32c", checked(scatter), size, _TORCH_PACE
        ),
        Contest(f"unpack {name}", unpack, to_cache, scatter, size),
    ]


def _codecs(shape: Shape, tokens: int, generator: torch.Generator) -> list[Contest]:
    """The fp8 codec against the same in plain torch."""
    cache, table = shape.cache(generator), _table(shape, tokens, generator)
    size = _payload_bytes(shape, shape.heads, tokens, "fp8")
    payload = torch.zeros(size, dtype=torch.uint8)
    raw = _payload_bytes(shape, shape.heads, tokens, "raw")

    def in_torch(run: Callable[[], object]) -> Callable[[], None]:
        def plain() -> None:
            kept = native.libraries.of("cpu")
            native.libraries.use("cpu", None)
            run()
            native.libraries.use("cpu", kept)

        return plain

    def pack() -> int:
        return ops.kv_pack(cache, table, 0, tokens, payload, "fp8")

    def unpack() -> int:
        return ops.kv_unpack(payload, cache, table, 0, tokens, "fp8")

    pack()
    return [
        Contest("pack fp8", pack, "the same in torch", in_torch(pack), raw),
        Contest("unpack fp8", unpack, "the same in torch", in_torch(unpack), raw),
    ]


def _table(shape: Shape, tokens: int, generator: torch.Generator) -> list[int]:
    count = -(-tokens // shape.block_size)
    return [int(block) for block in torch.randperm(shape.num_blocks, generator=generator)[:count]]


def _payload_bytes(shape: Shape, heads: int, tokens: int, codec: str) -> int:
    return ops.payload_bytes(shape.layers, 2, tokens, heads, shape.head_dim, 2, codec)


def _measure(contest: Contest, repeats: int, threads: int) -> dict[str, Any]:
    sides = {"ours": contest.ours, "peer": contest.peer}
    walls: dict[str, list[float]] = {name: [] for name in sides}
    cpus: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    for turn in range(repeats):
        for name in sorted(sides, reverse=turn % 2 == 1):
            wall, cpu = time.perf_counter(), time.process_time()
            sides[name]()
            walls[name].append(time.perf_counter() - wall)
            cpus[name].append(time.process_time() - cpu)
    judged = cpus if threads == 1 else walls
    medians = {name: statistics.median(times) for name, times in judged.items()}
    return {
        "name": contest.name,
        "peer": contest.peer_name,
        "bytes": contest.num_bytes,
        "ours_ms": round(medians["ours"] * 1e3, 3),
        "peer_ms": round(medians["peer"] * 1e3, 3),
        "ours_wall_ms": round(statistics.median(walls["ours"]) * 1e3, 3),
        "peer_wall_ms": round(statistics.median(walls["peer"]) * 1e3, 3),
        "ratio": round(medians["peer"] / medians["ours"], 2),
        "at_least": contest.at_least,
    }


def _line(row: Mapping[str, Any]) -> str:
    pace = row["bytes"] / row["ours_ms"] / 1e6
    asked = "" if row["at_least"] is None else f" (at least {row['at_least']})"
    return (
        f"{row['name']:36} {row['ours_ms']:9.2f} ms {pace:6.2f} GB/s   {row['peer']:31}"
        f" {row['peer_ms']:9.2f} ms   {row['ratio']:6.2f}{asked}"
    )


def _verdict(row: Mapping[str, Any]) -> str:
    return f"{row['name']} {row['ratio']} of {row['peer']}'s pace ({row['at_least']})"


def _write(output: Path | None, rows: list[dict[str, Any]], run: Mapping[str, Any]) -> None:
    if output is None:
        return
    report = {**environment(), "torch": importlib.metadata.version("torch"), **run, "rows": rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
