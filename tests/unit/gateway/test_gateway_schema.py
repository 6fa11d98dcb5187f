"""Bad input: a clear 4xx that names the field, in a short body, from a gateway that goes on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from gateway_fakes import MODEL, Edges, FakeGenerator, edge_settings, running_edges

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = '"messages":[{"role":"user","content":"hi"}]'
MAX_ERROR_BYTES = 1500
BIG_INT = "1" + "0" * 30
ENDLESS_INT = "1" + "0" * 6000
SURROGATE = '"\\ud800"'
LONG = "z" * 20_000


@pytest.fixture
async def edges() -> AsyncIterator[Edges]:
    async with running_edges(FakeGenerator()) as running:
        yield running


# Field with its JSON value -> the field that the refusal names. Both routes take these.
SAMPLING = [
    *((f'"{name}":NaN', name) for name in ("temperature", "top_p", "min_p", "presence_penalty")),
    *((f'"{name}":NaN', name) for name in ("frequency_penalty", "repetition_penalty", "seed")),
    *((f'"{name}":NaN', name) for name in ("max_tokens", "n", "top_k")),
    *((f'"{name}":Infinity', name) for name in ("temperature", "top_p", "repetition_penalty")),
    *((f'"{name}":-Infinity', name) for name in ("temperature", "presence_penalty")),
    *((f'"{name}":1e999', name) for name in ("temperature", "min_p")),
    *((f'"{name}":true', name) for name in ("temperature", "n", "max_tokens", "top_k", "seed")),
    *((f'"{name}":"1"', name) for name in ("temperature", "top_p", "n", "max_tokens", "seed")),
    *((f'"{name}":[]', name) for name in ("temperature", "n", "max_tokens", "stream")),
    *((f'"{name}":{{}}', name) for name in ("top_p", "seed", "ignore_eos")),
    *((f'"{name}":{BIG_INT}', name) for name in ("max_tokens", "n", "seed", "top_k")),
    *((f'"{name}":{ENDLESS_INT}', name) for name in ("max_tokens", "n", "seed", "temperature")),
    *((f'"{name}":1.5', name) for name in ("max_tokens", "n", "top_k")),
    *((f'"{name}":-1', name) for name in ("temperature", "top_p", "min_p", "max_tokens", "n")),
    ('"temperature":2.1', "temperature"),
    ('"top_p":0', "top_p"),
    ('"top_p":1.1', "top_p"),
    ('"min_p":2', "min_p"),
    ('"presence_penalty":3', "presence_penalty"),
    ('"frequency_penalty":-2.5', "frequency_penalty"),
    ('"repetition_penalty":0', "repetition_penalty"),
    ('"top_k":-2', "top_k"),
    ('"n":0', "n"),
    ('"n":1000000', "n"),
    ('"max_tokens":0', "max_tokens"),
    ('"max_tokens":-5', "max_tokens"),
    ('"max_tokens":4294967296', "max_tokens"),
    ('"stop":5', "stop"),
    ('"stop":[5]', "stop"),
    ('"stop":{"a":"b"}', "stop"),
    ('"stop":""', "stop"),
    ('"stop":["a",""]', "stop"),
    (f'"stop":"{LONG}"', "stop"),
    (f'"stop":{json.dumps(["a"] * 100)}', "stop"),
    (f'"stop":{SURROGATE}', "stop"),
    (f'"stop":["a",{SURROGATE}]', "stop[1]"),
    ('"stop_token_ids":5', "stop_token_ids"),
    ('"stop_token_ids":["5"]', "stop_token_ids[0]"),
    ('"stop_token_ids":[1,true]', "stop_token_ids[1]"),
    ('"stop_token_ids":[1,-1]', "stop_token_ids[1]"),
    ('"stop_token_ids":[100000]', "stop_token_ids"),
    (f'"stop_token_ids":{json.dumps([1] * 1000)}', "stop_token_ids"),
    ('"logit_bias":[]', "logit_bias"),
    ('"logit_bias":{"a":1}', "logit_bias"),
    ('"logit_bias":{"-1":1}', "logit_bias"),
    ('"logit_bias":{"1_0":1}', "logit_bias"),
    ('"logit_bias":{"\u0661":1}', "logit_bias"),
    ('"logit_bias":{"99999":1}', "logit_bias"),
    ('"logit_bias":{"1":"1"}', "logit_bias"),
    ('"logit_bias":{"1":true}', "logit_bias"),
    ('"logit_bias":{"1":NaN}', "logit_bias"),
    ('"logit_bias":{"1":101}', "logit_bias"),
    (f'"logit_bias":{{"1":{ENDLESS_INT}}}', "logit_bias"),
    (f'"logit_bias":{json.dumps({str(i): 1 for i in range(900)})}', "logit_bias"),
    (f'"logit_bias":{{"{LONG}":1}}', "logit_bias"),
    ('"stream":"yes"', "stream"),
    ('"stream":1', "stream"),
    ('"stream_options":5', "stream_options"),
    ('"stream_options":{"include_usage":"yes"}', "stream_options.include_usage"),
    ('"ignore_eos":1', "ignore_eos"),
    (f'"user":{SURROGATE}', "user"),
    (f'"metadata":{{"a":[1,{SURROGATE}]}}', "metadata.a[1]"),
    ('"tools":[{"type":"function","function":{"name":"f"}}]', "tools"),
    ('"tool_choice":"auto"', "tool_choice"),
    ('"functions":[{"name":"f"}]', "functions"),
    ('"function_call":"auto"', "function_call"),
    ('"response_format":{"type":"json_object"}', "response_format"),
    (
        '"response_format":{"type":"json_schema","json_schema":{"schema":{"$ref":"#"}}}',
        "response_format",
    ),
    ('"modalities":["text","audio"]', "modalities"),
    ('"audio":{"voice":"a"}', "audio"),
    ('"prediction":{"type":"content","content":"x"}', "prediction"),
    ('"echo":true', "echo"),
    ('"suffix":"x"', "suffix"),
    ('"guided_json":{"type":"object"}', "guided_json"),
    ('"guided_regex":"a+"', "guided_regex"),
    ('"min_tokens":3', "min_tokens"),
    ('"bad_words":["a"]', "bad_words"),
    ('"use_beam_search":true', "use_beam_search"),
    ('"chat_template":"{{ 1 }}"', "chat_template"),
    ('"truncate_prompt_tokens":1', "truncate_prompt_tokens"),
    ('"prompt_logprobs":1', "prompt_logprobs"),
]

CHAT_ONLY = [
    ('"model":5,' + USER, "model"),
    (USER, "model"),
    ('"model":"fake-model"', "messages"),
    ('"model":"fake-model","messages":[]', "messages"),
    ('"model":"fake-model","messages":{}', "messages"),
    ('"model":"fake-model","messages":"hi"', "messages"),
    ('"model":"fake-model","messages":null', "messages"),
    ('"model":"fake-model","messages":[5]', "messages[0]"),
    ('"model":"fake-model","messages":[{}]', "messages[0].role"),
    *(
        (f'"model":"fake-model","messages":[{message}]', f"messages[0].{name}")
        for message, name in [
            ('{"role":5,"content":"a"}', "role"),
            ('{"role":"root","content":"a"}', "role"),
            (f'{{"role":"{LONG}","content":"a"}}', "role"),
            ('{"role":"tool","content":"a"}', "role"),
            ('{"role":"function","content":"a"}', "role"),
            ('{"role":"user"}', "content"),
            ('{"role":"user","content":null}', "content"),
            ('{"role":"assistant","content":null}', "content"),
            ('{"role":"user","content":5}', "content"),
            ('{"role":"user","content":[]}', "content"),
            ('{"role":"user","content":{"type":"text"}}', "content"),
            ('{"role":"user","content":["a"]}', "content[0]"),
            ('{"role":"user","content":[{}]}', "content[0].type"),
            ('{"role":"user","content":[{"type":"text"}]}', "content[0].text"),
            ('{"role":"user","content":[{"type":"text","text":5}]}', "content[0].text"),
            (f'{{"role":"user","content":{SURROGATE}}}', "content"),
            (f'{{"role":"user","content":"a","name":{SURROGATE}}}', "name"),
            ('{"role":"user","content":"a","name":5}', "name"),
            ('{"role":"assistant","content":"","tool_calls":[{"id":"a"}]}', "tool_calls"),
            ('{"role":"assistant","content":"","function_call":{"a":1}}', "function_call"),
            (
                '{"role":"user","content":[{"type":"text","text":"a"},'
                '{"type":"image_url","image_url":{"url":"http://127.0.0.1:9/x"}}]}',
                "content[1].type",
            ),
            ('{"role":"user","content":[{"type":"input_audio"}]}', "content[0].type"),
            ('{"role":"user","content":[{"type":"file","file":{}}]}', "content[0].type"),
        ]
    ),
    (
        '"model":"fake-model","messages":[{"role":"user","content":"a"},{"role":"x","content":""}]',
        "messages[1].role",
    ),
    *(
        (f'"model":"fake-model",{USER},{extra}', name)
        for extra, name in [
            ('"max_completion_tokens":0', "max_completion_tokens"),
            ('"max_completion_tokens":-1', "max_completion_tokens"),
            ('"max_completion_tokens":true', "max_completion_tokens"),
            ('"max_tokens":1,"max_completion_tokens":2', "max_completion_tokens"),
            ('"logprobs":1', "logprobs"),
            ('"logprobs":"true"', "logprobs"),
            ('"top_logprobs":2', "top_logprobs"),
            ('"logprobs":true,"top_logprobs":21', "top_logprobs"),
            ('"logprobs":true,"top_logprobs":-1', "top_logprobs"),
            ('"logprobs":true,"top_logprobs":true', "top_logprobs"),
        ]
    ),
]

COMPLETION_ONLY = [
    ('"model":"fake-model"', "prompt"),
    *(
        (f'"model":"fake-model","prompt":{prompt}', name)
        for prompt, name in [
            ("null", "prompt"),
            ("5", "prompt"),
            ('""', "prompt"),
            ("[]", "prompt"),
            ("{}", "prompt"),
            ('[""]', "prompt[0]"),
            ("[[]]", "prompt[0]"),
            ('["a",[]]', "prompt[1]"),
            ('["a",5]', "prompt[1]"),
            ("[{}]", "prompt[0]"),
            ("[-1]", "prompt[0]"),
            ("[1,true]", "prompt[1]"),
            ("[1,1.5]", "prompt[1]"),
            ('[1,"a"]', "prompt[1]"),
            ("[[1],[1,null]]", "prompt[1][1]"),
            (f"[{BIG_INT}]", "prompt[0]"),
            (f"[{ENDLESS_INT}]", "prompt[0]"),
            ("[100000]", "prompt"),
            (SURROGATE, "prompt"),
            (f'["a",{SURROGATE}]', "prompt[1]"),
            (json.dumps(["a"] * 100), "prompt"),
        ]
    ),
    *(
        (f'"model":"fake-model","prompt":"a",{extra}', name)
        for extra, name in [
            ('"logprobs":21', "logprobs"),
            ('"logprobs":-1', "logprobs"),
            ('"logprobs":true', "logprobs"),
            ('"best_of":2', "best_of"),
            ('"n":2,"best_of":3', "best_of"),
            ('"max_tokens":0,"echo":false', "max_tokens"),
            ('"max_tokens":0,"echo":true', "echo"),
        ]
    ),
]

CASES = [
    *((CHAT, f'{{"model":"{MODEL}",{USER},{fields}}}', param) for fields, param in SAMPLING),
    *(
        (COMPLETIONS, f'{{"model":"{MODEL}","prompt":"a",{fields}}}', param)
        for fields, param in SAMPLING
    ),
    *((CHAT, f"{{{fields}}}", param) for fields, param in CHAT_ONLY),
    *((COMPLETIONS, f"{{{fields}}}", param) for fields, param in COMPLETION_ONLY),
]


async def _refused(edges: Edges, path: str, raw: bytes, status: int = 400) -> dict[str, object]:
    response = await edges.http.post(path, content=raw)
    assert response.status_code == status, (raw[:200], response.text)
    assert len(response.content) < MAX_ERROR_BYTES
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    return error


async def test_every_bad_field_is_named(edges: Edges) -> None:
    for path, raw, param in CASES:
        error = await _refused(edges, path, raw.encode())
        assert error["param"] == param, (raw[:200], error)
        assert param in error["message"], error
    assert edges.generator.requests == []
    assert edges.generator.num_open == 0
    assert (await edges.chat()).status_code == 200
    counted = edges.metric("forebay_request_errors_total", code="invalid_argument", model_name="")
    assert counted == len(CASES)


BODIES = [
    b"",
    b"null",
    b"5",
    b"[]",
    b'"text"',
    b"{",
    b'{"model":}',
    b'{"model":"fake-model",}',
    b"not json",
    b"\xff\xfe{}",
    b'{"model":"\xff"}',
    b'{"\\ud800":1}',
    b'{"model":"fake-model"}{"model":"fake-model"}',
    "{}".encode("utf-16"),
    b"[" * 100_000,
    b'{"a":' * 20_000,
    b"{" + b'"model":' * 10,
    b"\x00" * 100,
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_what_is_no_json_object_is_refused(edges: Edges, path: str) -> None:
    for raw in BODIES:
        error = await _refused(edges, path, raw)
        assert error["param"] is None
    assert (await edges.chat()).status_code == 200


async def test_deep_nesting_in_an_ignored_field_is_no_crash(edges: Edges) -> None:
    for depth in (150, 500, 50_000):
        raw = f'{{"model":"{MODEL}",{USER},"metadata":{"[" * depth}{"]" * depth}}}'
        response = await edges.http.post(CHAT, content=raw)
        assert response.status_code in (200, 400)
    assert (await edges.chat()).status_code == 200


async def test_an_unknown_model_is_a_short_404(edges: Edges) -> None:
    for model in ("other", "x" * 100_000, "\u0000", "é" * 1000, ""):
        response = await edges.chat(model=model)
        assert response.status_code == 404
        assert response.json()["error"]["param"] == "model"
        assert len(response.content) < 4000


async def test_a_large_list_of_bad_messages_gets_a_short_answer(edges: Edges) -> None:
    raw = json.dumps({"model": MODEL, "messages": [{}] * 10_000}).encode()
    error = await _refused(edges, CHAT, raw)
    assert error["param"] == "messages[0].role"


async def test_odd_unicode_is_text(edges: Edges) -> None:
    texts = ["\u0000", "\U0010ffff", "\ufffe", "e\u0301" * 100, "<|im_end|>", "\u2028", "👩‍👩‍👧"]
    for text in texts:
        assert (await edges.chat(messages=[{"role": "user", "content": text}])).status_code == 200
        assert (await edges.complete(prompt=text)).status_code == 200


async def test_tiny_temperatures_are_fine(edges: Edges) -> None:
    for temperature in (0, 1e-4, 1e-300, 5e-324, 2):
        assert (await edges.chat(temperature=temperature)).status_code == 200


async def test_bodies_past_the_cap() -> None:
    async with running_edges(FakeGenerator(), edge_settings(max_body_kib=4)) as edges:

        async def chunked() -> AsyncIterator[bytes]:
            for _ in range(8):
                yield b" " * 1024

        for content in (b" " * 5000, chunked()):
            response = await edges.http.post(CHAT, content=content)
            assert response.status_code == 413
            assert response.json()["error"]["type"] == "invalid_request_error"
        assert (await edges.chat()).status_code == 200
