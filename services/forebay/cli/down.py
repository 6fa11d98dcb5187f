"""`forebay down`"""

from __future__ import annotations

import time

import click

from forebay.deploy import local


@click.command()
def down() -> None:
    """End the local platform. Streams under way may finish first, within the drain limit."""
    began = time.monotonic()
    if local.stop():
        click.echo(f"The platform has ended ({time.monotonic() - began:.1f} s).")
    else:
        click.echo("No platform runs here.")
