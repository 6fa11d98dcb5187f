from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result

from forebay.cli.main import main
from forebay.cli.status import size
from forebay.core.errors import ConfigurationError
from forebay.deploy.options import UpOptions
from forebay.deploy.ports import free_ports
from forebay.rpc.v1 import inference_pb2 as pb
from forebay.rpc.v1 import inference_pb2_grpc


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOREBAY_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def run(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(main, list(arguments), **options)


def assert_one_line(result: Result, expected: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("forebay: ")
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr


@pytest.mark.parametrize("command", ["status", "models", "chat"])
def test_needs_a_platform(command: str) -> None:
    assert_one_line(run(command), "no platform runs here")


def test_scale_needs_a_platform() -> None:
    assert_one_line(run("scale", "decode", "2"), "no platform runs here")


def test_down_is_idempotent() -> None:
    result = run("down")
    assert result.exit_code == 0
    assert result.output == "No platform runs here.\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["up", "--nonsense"],
        ["up", "--prefill", "-1"],
        ["up", "--http-port", "99999"],
        ["up", "--engine", "magic"],
        ["up", "--kv-codec", "zip"],
        ["chat", "hi", "--max-tokens", "0"],
        ["scale", "decode"],
        ["scale", "decode", "-1"],
        ["scale", "nonsense", "1"],
        ["nonsense"],
    ],
)
def test_usage_errors(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_configuration_errors_are_one_line() -> None:
    assert_one_line(run("up", "--decode", "0"), "at least one prefill and one decode")
    assert_one_line(run("up", "--model", "gpt-17"), "no such model")
    result = run("up", env={"FOREBAY_GATEWAY_HTTP_PORT": "many"})
    assert_one_line(result, "FOREBAY_GATEWAY_HTTP_PORT")


def test_no_gateway_at_the_address() -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    assert_one_line(run("chat", "hi", "--address", address), f"no gateway answers on {address}")


def test_help_names_every_command() -> None:
    output = run("--help").output
    for command in ("up", "down", "status", "chat", "explain", "models"):
        assert f"  {command} " in output
        assert run(command, "--help").exit_code == 0


class Parrot(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []

    def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:  # type: ignore[override]
        self.requests.append(request)
        if request.chat.messages[-1].content == "fail":
            context.abort(grpc.StatusCode.UNAVAILABLE, "draining")
        for word in request.chat.messages[-1].content.split():
            yield pb.GenerateResponse(chunk=pb.GenerateChunk(text=word + " "))
        yield pb.GenerateResponse(complete=pb.GenerateComplete())

    def ListModels(self, request: Any, context: Any) -> pb.ListModelsResponse:  # type: ignore[override]
        return pb.ListModelsResponse(models=[pb.ModelCard(id="parrot", max_model_len=9)])


@pytest.fixture
def parrot() -> Iterator[tuple[Parrot, str]]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    servicer = Parrot()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_chat_once(parrot: tuple[Parrot, str]) -> None:
    servicer, address = parrot
    result = run("chat", "hello you", "--address", address, "--system", "S", "--max-tokens", "7")
    assert (result.exit_code, result.output) == (0, "hello you \n")
    request = servicer.requests[0]
    assert request.model == "parrot"
    assert [message.role for message in request.chat.messages] == ["system", "user"]
    assert request.sampling.max_tokens == 7
    assert not request.sampling.HasField("temperature")


def test_conversation_keeps_its_turns(parrot: tuple[Parrot, str]) -> None:
    servicer, address = parrot
    result = run("chat", "--address", address, input="one\n\nfail\ntwo\n")
    assert result.exit_code == 0
    assert "one \n" in result.stdout and "two \n" in result.stdout
    assert "draining" in result.stderr
    last = [(message.role, message.content) for message in servicer.requests[-1].chat.messages]
    assert last == [("user", "one"), ("assistant", "one "), ("user", "two")]


def test_models(parrot: tuple[Parrot, str]) -> None:
    result = run("models", "--address", parrot[1])
    assert result.exit_code == 0
    assert "parrot" in result.output


def test_light_commands_import_neither_torch_nor_ray() -> None:
    script = (
        "import sys; from forebay.cli.main import main\n"
        "for command in ('status', 'down', 'chat', 'explain', 'models', 'up'):\n"
        "    assert main.get_command(None, command) is not None\n"
        "print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_a_missing_package_is_one_line() -> None:
    script = (
        "import sys; sys.modules['redis'] = None; sys.modules['redis.asyncio'] = None\n"
        "from forebay.cli.main import main; main(['status'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "forebay[local]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0B"), (999, "999B"), (1000, "1.0kB"), (1_740_000, "1.7MB"), (5 * 10**15, "5000.0TB")],
)
def test_size(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("arguments", "mixed"),
    [([], 0), (["--mixed"], 1), (["--mixed", "3"], 3), (["--mixed", "--engine=sim"], 1)],
)
def test_mixed_takes_a_number_or_none(
    arguments: list[str], mixed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[UpOptions] = []

    def refuse(options: UpOptions) -> None:
        asked.append(options)
        raise ConfigurationError("seen")

    monkeypatch.setattr(importlib.import_module("forebay.cli.up"), "make_plan", refuse)
    assert run("up", *arguments).exit_code == 1
    assert [options.mixed for options in asked] == [mixed]
