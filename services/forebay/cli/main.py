"""The `forebay` command. Each subcommand's module is imported when it is used: a client needs
neither the platform's packages nor their import time."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from forebay.core.errors import ForebayError

_COMMANDS = {
    "chat": "Talk to the platform's model.",
    "down": "End the local platform.",
    "explain": "Show why a request went where it went, and its timeline.",
    "models": "List the models that the platform serves.",
    "scale": "Change a pool's number of workers.",
    "status": "Show the workers of the local platform.",
    "up": "Start a platform on this machine.",
}

# grpc reports lost connections on stderr by itself; here every failure becomes one line of ours.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


class ForebayGroup(click.Group):
    """The one choke point of lazy imports: `forebay.cli.NAME` holds the command `NAME`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(_import(f"forebay.cli.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Errors that are the user's to see become one line and exit code 1."""
        try:
            return super().invoke(ctx)
        except ForebayError as error:
            click.echo(f"forebay: {error.message}", err=True)
            ctx.exit(1)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("forebay"):
            raise
        raise click.ClickException(
            f"this command needs forebay[local]: there is no module {error.name}"
        ) from error


@click.group(cls=ForebayGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="forebay", prog_name="forebay")
def main() -> None:
    """Serves language models from separate prefill and decode pools."""


if __name__ == "__main__":
    sys.exit(main())
