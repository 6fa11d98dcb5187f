"""`python -m forebay_loadtest`: N chat streams at once against a gateway."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import click

from forebay_loadtest.report import environment, summarise
from forebay_loadtest.streams import make_prompts, run_streams


@click.command()
@click.option("--url", default="http://127.0.0.1:8000/v1", show_default=True)
@click.option("--model", default="smollm2-135m-instruct", show_default=True)
@click.option("--streams", default=32, show_default=True, type=click.IntRange(1, 4096))
@click.option("--max-tokens", default=48, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON here.")
def main(
    url: str, model: str, streams: int, max_tokens: int, seed: int, output: Path | None
) -> None:
    """Exits with 1 unless every stream completes and every usage adds up."""
    began = time.monotonic()
    results = asyncio.run(run_streams(url, model, make_prompts(streams, seed), max_tokens, seed))
    figures = summarise(results, time.monotonic() - began)
    report = json.dumps({**environment(), "max_tokens": max_tokens, "seed": seed, **figures})
    click.echo(report)
    if output is not None:
        output.write_text(report + "\n")
    ok = figures["num_complete"] == streams and figures["usage_adds_up"]
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
