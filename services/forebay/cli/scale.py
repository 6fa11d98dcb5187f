"""`forebay scale`"""

from __future__ import annotations

import click

from forebay.cli.console import running_platform
from forebay.core.roles import WorkerRole
from forebay.deploy import scaling


@click.command()
@click.argument("role", type=click.Choice([role.value for role in WorkerRole]))
@click.argument("replicas", type=click.IntRange(min=0))
def scale(role: str, replicas: int) -> None:
    """Ask for another number of workers in a pool of the local platform.

    Workers that are too many refuse new requests, finish or hand over what they have, and end.
    """
    scaling.scale(running_platform(), WorkerRole(role), replicas)
    click.echo(f"The {role} pool goes to {replicas} workers; `forebay status` shows it.")
