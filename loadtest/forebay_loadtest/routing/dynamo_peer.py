"""NVIDIA Dynamo's frontend with its mocker workers on loopback, as the peer to compare with.

It wants a Python environment of its own: ai-dynamo and ai-dynamo-runtime 1.6.1 without their
dependencies, then aiohttp, kubernetes<33, msgspec, prometheus-client, pydantic, pyzmq, redis,
tqdm, transformers, zstandard and uvloop. Neither etcd nor NATS is needed.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from forebay.deploy.ports import LOOPBACK, free_ports
from forebay.deploy.processes import ProcessRecord, end_processes
from forebay.text.sim import sim_tokenizer_spec
from forebay_loadtest.local_platform import PlatformError
from forebay_loadtest.routing.bare_platform import START_LIMIT_S, Capacity, Child

DYNAMO_MODEL = "mock"
_PLANES = ("--discovery-backend=file", "--request-plane=tcp", "--event-plane=zmq")
_HOSTS = ("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST")
_STOP_S = 5.0
_POLL_S = 0.2


@asynccontextmanager
async def dynamo(
    python: Path,
    capacity: Capacity,
    *,
    router_mode: str,
    speedup: float,
    settings: Mapping[str, str],
) -> AsyncIterator[str]:
    """Yields its URL once it knows all workers. `python`: the interpreter that has Dynamo.
    `speedup`: of the mocker's modelled times. `settings`: DYN_* variables. Raises
    PlatformError."""
    with tempfile.TemporaryDirectory(prefix="forebay-dynamo-") as name:
        folder = Path(name)
        write_tokenizer(folder / "model")
        (port,) = free_ports(1)
        records = folder / "records"
        records.mkdir()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DYN_", "PYTHON"))}
        own = {"DYN_FILE_KV": str(records), **dict.fromkeys(_HOSTS, LOOPBACK)}
        environ = {**inherited, **own, **settings}
        mocker = (
            *("-m", "dynamo.mocker", f"--model-path={folder / 'model'}"),
            *(f"--model-name={DYNAMO_MODEL}", f"--num-workers={capacity.num_workers}"),
            *(f"--speedup-ratio={speedup:g}", f"--block-size={capacity.block_size}"),
            f"--num-gpu-blocks-override={capacity.num_blocks}",
            f"--max-num-batched-tokens={capacity.max_batch_tokens}",
            f"--max-num-seqs={capacity.max_num_seqs}",
        )
        frontend = (
            *("-m", "dynamo.frontend", f"--http-host={LOOPBACK}", f"--http-port={port}"),
            *(f"--router-mode={router_mode}", f"--kv-cache-block-size={capacity.block_size}"),
        )
        children = [
            Child(
                title,
                port,
                port,
                (str(python), *command, *_PLANES),
                environ,
                folder / f"{title}.log",
            )
            for title, command in (("mocker", mocker), ("frontend", frontend))
        ]
        try:
            for child in children:
                child.start()
            url = f"http://{LOOPBACK}:{port}"
            await _ready(url, children, records, capacity.num_workers)
            yield url
        finally:
            _end(children)


def write_tokenizer(folder: Path) -> None:
    """The sim engine's tokenizer and template as a model folder: the same text is the same tokens
    in both systems."""
    spec = sim_tokenizer_spec()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 259,
        "max_position_embeddings": 131_072,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": spec.chat_template,
        "eos_token": spec.eos_token,
        "pad_token": spec.pad_token,
    }
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(spec.tokenizer_json)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "config.json").write_text(json.dumps(config))


async def _ready(url: str, children: list[Child], records: Path, num_workers: int) -> None:
    """All workers are in its file registry, and a prompt too short for a block is answered."""
    body = {"model": DYNAMO_MODEL, "messages": [{"role": "user", "content": "?"}], "max_tokens": 1}
    end = time.monotonic() + START_LIMIT_S
    async with httpx.AsyncClient(trust_env=False, timeout=5.0) as http:
        while time.monotonic() < end:
            for child in children:
                _ = child.record
            await asyncio.sleep(_POLL_S)
            if len(list(records.glob("v1/mdc/*"))) < num_workers:
                continue
            try:
                answer = await http.post(f"{url}/v1/chat/completions", json=body)
            except httpx.TransportError:
                continue
            if answer.status_code == 200:
                return
    raise PlatformError(f"Dynamo did not start: {children[1].last_words()}")


def _end(children: list[Child]) -> None:
    started = [child.process for child in children if child.process is not None]
    records = [ProcessRecord.of(process.pid) for process in started]
    end_processes([record for record in records if record is not None], _STOP_S)
    for process in started:
        process.wait()
