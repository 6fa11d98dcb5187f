"""`forebay up`"""

from __future__ import annotations

import asyncio
import time

import click
from rich.console import Console
from rich.markup import escape

from forebay.cli.progress_display import show_progress
from forebay.client import ForebayClient
from forebay.core.errors import ForebayError
from forebay.core.kv_codec import KvCodec
from forebay.deploy import local
from forebay.deploy.options import UpOptions, make_plan
from forebay.deploy.run_state import RunState
from forebay.rpc.v1 import inference_pb2

QUESTION = "What is the capital of France?"
QUESTION_LIMIT_S = 120.0

_count = click.IntRange(min=0)
_positive = click.IntRange(min=1)
_port = click.IntRange(1, 65535)


@click.command()
@click.option("--model", help="The default model's name, a .gguf file or a safetensors folder.")
@click.option("--prefill", type=_count, help="Prefill workers; 1 unless --mixed is given.")
@click.option("--decode", type=_count, help="Decode workers; 1 unless --mixed is given.")
@click.option(
    "--mixed",
    type=_positive,
    is_flag=False,
    flag_value=1,
    metavar="[N]",
    help="One pool of workers that do both, instead; one worker unless N is given.",
)
@click.option(
    "--engine", type=click.Choice(["torch", "sim"]), help="sim: no model, seeded nonsense."
)
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16", "fp16"]))
@click.option("--http-port", type=_port, help="OpenAI-compatible HTTP; 8000 unless set elsewhere.")
@click.option("--grpc-port", type=_port, help="Public gRPC; 8001 unless set elsewhere.")
@click.option("--max-model-len", type=_positive, help="Prompt plus answer, in tokens.")
@click.option("--kv-memory-mib", type=_positive, help="KV memory of each worker.")
@click.option(
    "--kv-codec",
    type=click.Choice([codec.value for codec in KvCodec]),
    help="How KV travels between workers; fp8: half the bytes of bf16, less precise.",
)
@click.option("--threads", type=_positive, help="CPU threads of each worker's model.")
def up(mixed: int | None, **options: object) -> None:
    """Start a platform on this machine: Redis, Ray, workers and a gateway, all on loopback."""
    plan = make_plan(UpOptions(mixed=mixed or 0, **options))  # type: ignore[arg-type]
    console = Console(highlight=False, soft_wrap=True)
    began = time.monotonic()
    try:
        with show_progress(console) as notify:
            run = local.start(plan, notify)
    except KeyboardInterrupt:
        click.echo("Interrupted: nothing is left running.", err=True)
        raise SystemExit(130) from None
    started_s = time.monotonic() - began
    console.print(f"The platform is ready ({started_s:.1f} s).")
    try:
        _ask(console, run)
    except (ForebayError, KeyboardInterrupt) as error:
        local.stop()
        reason = error.message if isinstance(error, ForebayError) else "interrupted"
        click.echo(f"forebay: no answer, so the platform was ended: {reason}", err=True)
        raise SystemExit(1) from None
    console.print(f"OpenAI base URL  {run.http_url}/v1")
    console.print(f"gRPC             {run.grpc_address}")
    console.print(f"Metrics          {run.http_url}/metrics")
    console.print(f"Logs             {run.log_dir}")
    console.print("`forebay chat` talks to it, `forebay status` shows it, `forebay down` ends it.")


def _ask(console: Console, run: RunState) -> None:
    began = time.monotonic()
    answer = asyncio.run(_answer(run))
    note = " (the sim engine's nonsense: it has no model)" if run.engine == "sim" else ""
    console.print(
        f"{QUESTION} [bold]{escape(answer)}[/bold]{note} ({time.monotonic() - began:.1f} s)"
    )


async def _answer(run: RunState) -> str:
    messages = [inference_pb2.ChatMessage(role="user", content=QUESTION)]
    sampling = inference_pb2.SamplingParams(temperature=0.0, max_tokens=32)
    parts = []
    async with ForebayClient(run.grpc_address) as client:
        async for event in client.chat(run.model_id, messages, sampling, QUESTION_LIMIT_S):
            if isinstance(event, inference_pb2.GenerateChunk):
                parts.append(event.text)
    return "".join(parts).strip()
