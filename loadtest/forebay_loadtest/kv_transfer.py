"""`python -m forebay_loadtest.kv_transfer`: KV of a prompt from one process to another.

A worker's sender and receiver move the KV of 4,000 tokens of the default model over loopback gRPC,
raw and with the fp8 codec. Beside each transfer, taking turns with it, the same messages go over
the same kind of stream with nothing done to them on either side: what the loopback allows. The
share is the ratio of the two times.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import statistics
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from forebay.core.clock import Deadline
from forebay.core.kv_codec import KvCodec
from forebay.core.settings import WorkerSettings
from forebay.rpc.conversions import codec_to_proto
from forebay.rpc.grpc_connector import GrpcConnector
from forebay.rpc.methods import PROTOCOL_VERSION
from forebay.rpc.v1 import worker_pb2
from forebay.worker.kv_push import KvPush
from forebay.worker.malloc import keep_freed_memory
from forebay.worker.thread_executor import ThreadExecutor
from forebay.worker.transfer import ConnectorKvTransport, KvSender
from forebay_kernels import native
from forebay_loadtest.kv_transfer_ends import DTYPES, SINK, KvHolder
from forebay_loadtest.report import environment

TIMEOUT_S = 120.0


@dataclass(slots=True)
class Timings:
    """Of one kind of run: seconds, and CPU seconds of both processes."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def figures(self, num_bytes: int) -> dict[str, float]:
        wall_s = statistics.median(self.wall_s)
        return {
            "ms": round(1000 * wall_s, 2),
            "ms_min": round(1000 * min(self.wall_s), 2),
            "ms_max": round(1000 * max(self.wall_s), 2),
            "gb_per_s": round(num_bytes / wall_s / 1e9, 3),
            "cpu_ms": round(1000 * statistics.median(self.cpu_s), 2),
        }


@dataclass(frozen=True, slots=True)
class Options:
    num_tokens: int
    num_rounds: int
    num_threads: int
    frame_kib: int


class Receiver:
    """The other process."""

    def __init__(self, process: Process, port: int) -> None:
        self._process = process
        self.address = f"127.0.0.1:{port}"

    @classmethod
    @asynccontextmanager
    async def start(cls, dtype: str, options: Options) -> AsyncIterator[Receiver]:
        arguments = (dtype, str(options.num_tokens), str(options.num_threads))
        module = "forebay_loadtest.kv_transfer_ends"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, *arguments, stdin=PIPE, stdout=PIPE
        )
        try:
            yield cls(process, (await _line(process))["port"])
        finally:
            assert process.stdin is not None
            process.stdin.close()
            await asyncio.wait_for(process.wait(), TIMEOUT_S)

    async def ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n".encode())
        return await _line(self._process)


async def _line(process: Process) -> dict[str, Any]:
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S)
    answer: dict[str, Any] = json.loads(line)
    return answer


class Course:
    """One dtype's and codec's transfers, and the same messages over a bare stream."""

    def __init__(self, holder: KvHolder, receiver: Receiver, codec: KvCodec, kib: int) -> None:
        self.codec = codec
        self.transfers, self.limits = Timings(), Timings()
        self._holder = holder
        self._receiver = receiver
        self._executor = ThreadExecutor()
        self._transport = ConnectorKvTransport(GrpcConnector())
        self._bare = GrpcConnector().connect(receiver.address)
        self._sender = KvSender(
            holder.as_runner, self._executor, self._transport, codec, kib * 1024, PROTOCOL_VERSION
        )
        self._messages: list[bytes] = []

    async def prepare(self) -> None:
        """Also runs both once, unmeasured."""
        push = await self._push()
        reading = asyncio.create_task(push.read_between_steps())
        self._messages = [message async for message in push]
        await reading
        await self.transfer()
        await self.limit()
        self.transfers, self.limits = Timings(), Timings()

    @property
    def num_bytes(self) -> int:
        return self._holder.kv_payload_bytes(self._holder.whole, self.codec)

    @property
    def num_frames(self) -> int:
        return len(self._messages) - 1

    async def transfer(self) -> None:
        push = await self._push()
        before = self._sender.num_bytes
        deadline = Deadline.after(TIMEOUT_S)
        await self._timed(self.transfers, lambda: self._sender.send(push, deadline))
        assert self._sender.num_bytes - before == self.num_bytes

    async def limit(self) -> None:
        deadline = Deadline.after(TIMEOUT_S)
        await self._timed(self.limits, lambda: self._bare.push(SINK, self._ready_made(), deadline))

    async def close(self) -> None:
        await self._transport.close()
        await self._bare.close()
        await asyncio.to_thread(self._executor.close)

    def figures(self) -> dict[str, Any]:
        pairs = zip(self.limits.wall_s, self.transfers.wall_s, strict=True)
        return {
            "bytes": self.num_bytes,
            "frames": self.num_frames,
            "transfer": self.transfers.figures(self.num_bytes),
            "limit": self.limits.figures(self.num_bytes),
            "share_of_limit": round(statistics.median(limit / time for limit, time in pairs), 3),
        }

    async def _push(self) -> KvPush:
        lease = await self._receiver.ask("lease")
        target = worker_pb2.TransferTarget(
            address=self._receiver.address,
            lease_id=lease["lease_id"],
            epoch=lease["epoch"],
            kv_codecs=[codec_to_proto(codec) for codec in KvCodec],
        )
        push = self._sender.open(self._holder.sequence(), target)
        push.complete(((0, 1),))
        return push

    async def _ready_made(self) -> AsyncIterator[bytes]:
        for message in self._messages:
            yield message

    async def _timed(self, timings: Timings, run: Callable[[], Awaitable[object]]) -> None:
        cpu_s = time.process_time() + (await self._receiver.ask("cpu"))["cpu_s"]
        began = time.perf_counter()
        await run()
        timings.wall_s.append(time.perf_counter() - began)
        cpu_now_s = time.process_time() + (await self._receiver.ask("cpu"))["cpu_s"]
        timings.cpu_s.append(cpu_now_s - cpu_s)


async def measure(dtype: str, options: Options) -> dict[str, Any]:
    """Figures by codec. `arrived_whole`: what lies there in the end is what was sent, or for a
    codec that loses something what that makes of it."""
    holder = KvHolder(dtype, options.num_tokens, seed=1)
    figures: dict[str, Any] = {}
    async with Receiver.start(dtype, options) as receiver:
        courses = [Course(holder, receiver, codec, options.frame_kib) for codec in KvCodec]
        for course in courses:
            await course.prepare()
        for number in range(options.num_rounds):
            for course in courses if number % 2 else reversed(courses):
                first, second = course.transfer, course.limit
                for run in (first, second) if number % 4 < 2 else (second, first):
                    await run()
        for course in courses:
            await course.transfer()
            arrived = (await receiver.ask("content"))["content"]
            course.transfers.wall_s.pop()
            course.transfers.cpu_s.pop()
            sent = holder.content(holder.block_table, through=course.codec)
            figures[course.codec.value] = {**course.figures(), "arrived_whole": arrived == sent}
        for course in courses:
            await course.close()
    return figures


def _table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "dtype codec     MB frames |  transfer ms     GB/s  CPU-ms |   limit ms     GB/s  CPU-ms"
        " | share"
    ]
    for dtype, by_codec in results.items():
        for codec, figures in by_codec.items():
            cells = [
                f"{part['ms']:11.1f} {part['gb_per_s']:8.2f} {part['cpu_ms']:7.1f}"
                for part in (figures["transfer"], figures["limit"])
            ]
            lines.append(
                f"{dtype:5} {codec:5} {figures['bytes'] / 1e6:6.1f} {figures['frames']:6}"
                f" |  {cells[0]} | {cells[1]} | {figures['share_of_limit']:5.2f}"
            )
    return "\n".join(lines)


def _auto() -> str:
    """What `--dtype auto` of a worker takes here."""
    capabilities = torch.cpu.get_capabilities()
    native_bf16 = any(capabilities.get(flag, False) for flag in ("avx512_bf16", "amx_bf16"))
    return "bf16" if native_bf16 else "fp32"


@click.command()
@click.option("--tokens", default=4000, show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=12, show_default=True, type=click.IntRange(2))
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="bf16 and fp32."
)
@click.option("--threads", default=1, show_default=True, help="Of each process's KV operations.")
@click.option("--frame-kib", default=WorkerSettings().kv_frame_kib, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Where the JSON goes too.")
def main(
    tokens: int,
    rounds: int,
    dtypes: tuple[str, ...],
    threads: int,
    frame_kib: int,
    output: Path | None,
) -> None:
    """Exits with 1 when something did not arrive as it was sent."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    options = Options(tokens, rounds, threads, frame_kib)
    load_average = [round(os.getloadavg()[0], 2)]
    results = {dtype: asyncio.run(measure(dtype, options)) for dtype in dtypes or ("bf16", "fp32")}
    library = native.libraries.of("cpu")
    load_average.append(round(os.getloadavg()[0], 2))
    report: dict[str, object] = {
        **environment(),
        "torch": torch.__version__,
        "grpcio": importlib.metadata.version("grpcio"),
        "kernels": "plain torch" if library is None else library.variant,
        "auto_dtype": _auto(),
        "tokens": tokens,
        "rounds": rounds,
        "threads": threads,
        "frame_kib": options.frame_kib,
        "load_average": load_average,
        "results": results,
    }
    click.echo(json.dumps(report))
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(_table(results))
    click.echo(
        f"Medians of {rounds}. Sender and receiver share {os.cpu_count()} cores with each other and"
        f" with whatever else runs here (load average {load_average[0]} before)."
    )
    whole = all(codec["arrived_whole"] for dtype in results.values() for codec in dtype.values())
    shares = ", ".join(
        f"{dtype} {codec} {figures['share_of_limit']:.2f}"
        for dtype, by_codec in results.items()
        for codec, figures in by_codec.items()
    )
    click.echo(f"{'OK' if whole else 'SHORT'}: all KV arrived; shares of the limit: {shares}")
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
