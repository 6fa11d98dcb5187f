"""`forebay chat`"""

from __future__ import annotations

import asyncio
import sys

import click

from forebay.cli.console import address_option, gateway_address
from forebay.client import ForebayClient
from forebay.core.errors import ForebayError, NotFound
from forebay.rpc.v1 import inference_pb2

ChatMessage = inference_pb2.ChatMessage


@click.command()
@click.argument("message", required=False)
@address_option
@click.option("--model", help="By default the first model that the platform serves.")
@click.option("--system", help="System prompt.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer, in tokens.")
@click.option("--temperature", type=click.FloatRange(0.0, 2.0), help="0 takes the likeliest token.")
def chat(
    message: str | None,
    address: str | None,
    model: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
) -> None:
    """Answer MESSAGE, or hold a conversation when there is none."""
    history = [ChatMessage(role="system", content=system)] if system else []
    with asyncio.Runner() as runner:
        client = runner.run(_connect(gateway_address(address)))
        try:
            model = model or runner.run(first_model(client))
            sampling = inference_pb2.SamplingParams(max_tokens=max_tokens, temperature=temperature)
            conversation = Conversation(client, model, sampling, history)
            if message is not None:
                runner.run(conversation.answer(message))
            else:
                _converse(runner, conversation)
        finally:
            runner.run(client.close())


async def _connect(address: str) -> ForebayClient:
    """A channel belongs to the loop that it was made on."""
    return ForebayClient(address)


async def first_model(client: ForebayClient) -> str:
    models = await client.list_models()
    if not models:
        raise NotFound("the platform serves no model at this moment")
    return models[0].id


class Conversation:
    """Turns so far; a turn that fails or is interrupted leaves no trace in them."""

    def __init__(
        self,
        client: ForebayClient,
        model: str,
        sampling: inference_pb2.SamplingParams,
        history: list[inference_pb2.ChatMessage],
    ) -> None:
        self._client = client
        self._model = model
        self._sampling = sampling
        self._history = history

    async def answer(self, message: str) -> str:
        """Prints the answer as it comes, and returns it."""
        turn = [*self._history, ChatMessage(role="user", content=message)]
        parts = []
        async for event in self._client.chat(self._model, turn, self._sampling):
            if isinstance(event, inference_pb2.GenerateChunk):
                parts.append(event.text)
                click.echo(event.text, nl=False)
                sys.stdout.flush()
        click.echo()
        text = "".join(parts)
        self._history = [*turn, ChatMessage(role="assistant", content=text)]
        return text


def _converse(runner: asyncio.Runner, conversation: Conversation) -> None:
    """Until the end of input. Ctrl-C ends an answer that is being written, else the command."""
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        if not line.strip():
            continue
        try:
            runner.run(conversation.answer(line))
        except KeyboardInterrupt:
            click.echo(" [interrupted]")
        except ForebayError as error:
            click.echo(f"forebay: {error.message}", err=True)
