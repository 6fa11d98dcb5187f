"""`forebay models`"""

from __future__ import annotations

import asyncio

import click
from rich.console import Console
from rich.table import Table

from forebay.cli.console import address_option, gateway_address
from forebay.client import ForebayClient
from forebay.rpc.v1 import inference_pb2


@click.command()
@address_option
def models(address: str | None) -> None:
    """List the models that the platform serves."""
    cards = asyncio.run(_list(gateway_address(address)))
    table = Table("model", "max_model_len", "engine")
    for card in cards:
        table.add_row(card.id, str(card.max_model_len), card.engine)
    Console().print(table)


async def _list(address: str) -> list[inference_pb2.ModelCard]:
    async with ForebayClient(address) as client:
        return await client.list_models()
