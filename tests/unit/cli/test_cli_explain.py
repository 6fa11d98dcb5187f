from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner, Result

from forebay.cli.main import main
from forebay.cli.timeline_chart import BAR_WIDTH, chart
from forebay.deploy.ports import free_ports


def phase(name: str, start_ms: float, duration_ms: float, leg: int | None = 0) -> dict[str, Any]:
    return {"name": name, "leg": leg, "start_ms": start_ms, "duration_ms": duration_ms}


def attempt(**fields: Any) -> dict[str, Any]:
    return {
        "routed_ms": 12.5,
        "first_look_ms": 12.5,
        "num_looks": 1,
        "decision_us": 85.0,
        "decode": "decode-a",
        "prefill": "prefill-b",
        "has_room": True,
        "pull_from": None,
        "reserved_ms": 14.0,
        "accepted_ms": 16.0,
        "refused_by": None,
        "scores": {"prefill-b": 10.0, "decode-a": 64.0, "prefill-a": 90.0},
        "matched_tokens": {"prefill-b": 64},
        "why": "prefill-b computes the prompt: [because].",
        **fields,
    }


def leg(number: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "leg": number,
        "continues": None,
        "choices": [0],
        "num_tokens_before": 0,
        "end": "finished",
        "lost_worker": None,
        "attempts": [attempt()],
        **fields,
    }


RECORD: dict[str, Any] = {
    "request_id": "req-1",
    "model": "m",
    "outcome": "completed",
    "num_prompt_tokens": 100,
    "num_cached_tokens": 64,
    "duration_ms": 400.0,
    "ttft_ms": 216.0,
    "phases": [
        phase("prepare", 0, 2, None),
        phase("queue", 2, 98),
        phase("route", 100, 16),
        phase("prefill", 116, 100),
        phase("decode", 216, 184),
    ],
    "num_legs": 1,
    "legs": [leg()],
    "choices": [{"num_tokens": 30}],
}


class Gateway:
    """Answers every path with `status` and `body`."""

    def __init__(self) -> None:
        self.status = 200
        self.body: bytes = json.dumps(RECORD).encode()
        self.paths: list[str] = []
        self.url = ""

    def explains(self, **changes: Any) -> str:
        self.body = json.dumps({**RECORD, **changes}).encode()
        result = self.run("req-1")
        assert result.exit_code == 0, result.output
        return result.output

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["explain", *arguments, "--url", self.url])


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    running = Gateway()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            running.paths.append(self.path)
            self.send_response(running.status)
            self.send_header("content-length", str(len(running.body)))
            self.end_headers()
            self.wfile.write(running.body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    server.shutdown()
    server.server_close()
    thread.join()


def test_one_request(gateway: Gateway) -> None:
    lines = [line.rstrip() for line in gateway.run("req-1").output.splitlines()]
    assert gateway.paths == ["/v1/requests/req-1/explain"]
    assert lines == [
        "Request req-1 (m): completed after 400.0 ms, first token after 216.0 ms",
        "100 prompt tokens, 64 of them cached; 30 generated",
        "",
        "worker     cost  cached tokens  chosen to",
        "prefill-b  10.0             64  prefill",
        "decode-a   64.0              0  decode",
        "prefill-a  90.0              0",
        "prefill-b computes the prompt: [because].",
        "Chosen at 12.5 ms (in 85 us), reserved at 14.0 ms, accepted at 16.0 ms",
        "",
        "phase       start ms         ms",
        "prepare          0.0        2.0  #.......................................",
        "queue            2.0       98.0  ##########..............................",
        "route          100.0       16.0  ..........##............................",
        "prefill        116.0      100.0  ...........###########..................",
        "decode         216.0      184.0  .....................###################",
    ]


def test_the_raw_record(gateway: Gateway) -> None:
    assert json.loads(gateway.run("req-1", "--json").output) == RECORD


def test_refusals_and_waits(gateway: Gateway) -> None:
    tries = [
        attempt(refused_by="decode-a", first_look_ms=1.0, scores={}),
        attempt(has_room=False, num_looks=12, first_look_ms=3.0, scores={}),
        attempt(),
    ]
    output = gateway.explains(legs=[leg(attempts=tries)])
    assert "At 1.0 ms: prefill-b and decode-a; decode-a refused\n" in output
    assert "At 3.0 ms: waited for room on prefill-b and decode-a, looked 12 times\n" in output
    last = gateway.explains(legs=[leg(attempts=tries[:2])])
    assert "Chosen at" not in last and "waited for room" in last


def test_a_migration(gateway: Gateway) -> None:
    legs = [
        leg(end="lost", lost_worker="decode-a"),
        leg(1, continues=0, num_tokens_before=7),
        leg(2, continues=0, choices=[1, 2]),
        leg(40, continues=39),
    ]
    output = gateway.explains(legs=legs, num_legs=4, phases=[phase("queue", 0, 9, 1)])
    assert "Leg 0, choices 0\n" in output
    assert "Leg 1, choices 0, goes on after 7 tokens from leg 0: decode-a was lost\n" in output
    assert "Leg 2, choices 1, 2, goes on from anew from leg 0: decode-a was lost\n" in output
    assert "leg phase" in output and "\n  1 queue" in output


def test_many_workers(gateway: Gateway) -> None:
    scores = {f"prefill-{i}": float(i) for i in range(40)}
    tries = [attempt(scores=scores, prefill="prefill-39", decode="gone", pull_from="prefill-0")]
    output = gateway.explains(legs=[leg(attempts=tries)])
    assert "and 23 more that cost more\n" in output
    assert "prefill-39" in output and "prefill-20" not in output
    assert "send its prefix" in output


def test_before_anything_has_happened(gateway: Gateway) -> None:
    output = gateway.explains(
        legs=[leg(attempts=[])], ttft_ms=None, outcome="running", duration_ms=0.0, phases=[]
    )
    assert "No worker was chosen." in output
    assert "running after 0.0 ms, no token yet" in output


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (404, {"error": {"code": "request_not_found", "message": "no such request: x"}}, "such"),
        (404, {"error": {"code": None, "message": "no such route"}}, "is it a gateway"),
        (404, "<html>", "answered 404"),
        (500, {"detail": 1}, "answered 500"),
        (200, {"hello": 1}, "gave no explanation"),
        (200, "<html>", "no gateway answers"),
    ],
)
def test_what_is_wrong_is_one_line(gateway: Gateway, status: int, body: Any, words: str) -> None:
    gateway.status = status
    gateway.body = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    result = gateway.run("req-1")
    assert result.exit_code == 1
    assert result.stderr.startswith("forebay: ") and result.stderr.count("\n") == 1
    assert words in result.stderr


def test_no_gateway_there() -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    result = CliRunner().invoke(main, ["explain", "x", "--url", url])
    assert result.exit_code == 1 and f"no gateway answers on {url}" in result.stderr


def test_an_id_is_only_an_id(gateway: Gateway) -> None:
    gateway.run("../../metrics?x=1")
    assert gateway.paths == ["/v1/requests/..%2F..%2Fmetrics%3Fx%3D1/explain"]


@pytest.mark.parametrize("duration_ms", [0.0, 0.001, 10.0, 1e9])
def test_bars_have_one_width(duration_ms: float) -> None:
    phases = [
        phase("a", 0, duration_ms / 2),
        phase("b", duration_ms / 2, duration_ms / 2),
        phase("c", duration_ms, 0),
    ]
    bars = [line.split()[-1] for line in chart(phases, duration_ms)]
    assert {len(bar) for bar in bars} == {BAR_WIDTH}
    assert all("#" in bar for bar in bars)
