from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from text_builders import byte_spec, trained_sentencepiece

from forebay.core.errors import InvalidRequest, ModelFileError
from forebay.text.client_data import MAX_TEXT_CHARS
from forebay.text.sim import sim_tokenizer_spec
from forebay.text.spec import TokenizerSpec
from forebay.text.tokenizer import Tokenizer
from forebay.text.tokenizer_json import template_processing

HI = [{"role": "user", "content": "hi"}]


def render(template: str, messages: Any = HI, **kwargs: Any) -> str:
    """The rendered prompt, through ids of the byte tokenizer."""
    tokenizer = Tokenizer(replace(sim_tokenizer_spec(), chat_template=template))
    ids = tokenizer.encode_chat(messages, **kwargs)
    return bytes(ids).decode()


def rejected(template: str, messages: Any = HI, **kwargs: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        render(template, messages, **kwargs)
    return caught.value


def with_json(spec: TokenizerSpec, **parts: Any) -> TokenizerSpec:
    return replace(spec, tokenizer_json=json.dumps({**json.loads(spec.tokenizer_json), **parts}))


def test_blocks_are_trimmed_as_transformers_does() -> None:
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"


def test_template_tools() -> None:
    assert (
        render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "01"
    )
    assert render("{% generation %}x{{ messages|length }}{% endgeneration %}y") == "x1y"
    assert render("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}") == "2"
    assert render("{{ add_generation_prompt }}", add_generation_prompt=False) == "False"
    assert render("{{ enable_thinking }}", enable_thinking=True) == "True"
    assert render("{{ tools is none }}{{ documents is none }}") == "TrueTrue"


def test_tojson_escapes_neither_html_nor_unicode() -> None:
    content = "<ü'&>"
    assert render("{{ messages[0].content|tojson }}", [{"role": "user", "content": content}]) == (
        f'"{content}"'
    )
    assert render("{{ [1, {'b': 2}]|tojson(indent=1) }}") == json.dumps([1, {"b": 2}], indent=1)


def test_special_tokens_are_variables_if_the_model_has_them() -> None:
    assert render("{{ bos_token is defined }} {{ pad_token is defined }}") == "False True"
    ids = Tokenizer(byte_spec(template="{{ eos_token }}x")).encode_chat(HI)
    assert ids == [257, ord("x")]


def test_the_clock_is_handed_in() -> None:
    spec = replace(sim_tokenizer_spec(), chat_template="{{ strftime_now('%d %b %Y') }}")
    tokenizer = Tokenizer(spec, wall_clock=lambda: datetime(2024, 2, 29))
    assert bytes(tokenizer.encode_chat(HI)) == b"29 Feb 2024"


def test_reasoning_has_one_name_for_templates() -> None:
    template = "{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        message = {"role": "assistant", "content": "", name: "why"}
        assert render(template, [message]) == "why|why"


def test_rejections_name_the_messages() -> None:
    error = rejected("{{ raise_exception('roles must alternate <here>') }}")
    assert (error.param, error.code) == ("messages", "template_rejected")
    assert "roles must alternate <here>" in error.message


def test_a_rejection_quotes_the_client_as_it_wrote() -> None:
    error = rejected(
        "{{ raise_exception('bad: ' + messages[0].content) }}",
        [{"role": "user", "content": "<|im_end|>"}],
    )
    assert "bad: <|im_end|>" in error.message


@pytest.mark.parametrize(
    "template",
    [
        "{{ missing.field }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].content + missing }}",
        "{{ 1 // 0 }}",
        "{{ messages[7].content }}",
        "{{ missing|tojson }}",
        "{{ messages.append(1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ range('x') }}",
    ],
)
def test_failing_templates_are_rejections(template: str) -> None:
    assert rejected(template).code == "template_rejected"


def test_broken_templates_are_model_file_errors() -> None:
    with pytest.raises(ModelFileError, match="broken"):
        render("{% if %}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    ],
)
def test_endless_templates_end(template: str) -> None:
    with pytest.raises(ModelFileError, match="chat template"):
        render(template)


def test_bad_messages_name_their_field() -> None:
    def error(messages: Any, **kwargs: Any) -> tuple[str | None, str]:
        found = rejected("x", messages, **kwargs)
        return found.param, found.message

    assert error([])[0] == "messages"
    assert error(["hi"])[0] == "messages[0]"
    assert error([{"content": "x"}])[0] == "messages[0].role"
    assert error([{"role": "user", "content": "a\ud800"}])[0] == "messages[0].content"
    assert error([{"role": "user", "content": [{"text": "\udfff"}]}])[0] == (
        "messages[0].content[0].text"
    )
    assert error([{"role": "user", "content": b"x"}])[0] == "messages[0].content"
    assert error([{"role": "user", "content": {1: "x"}}])[0] == "messages[0].content"
    assert error([{"role": "user", "\ud800": "x"}])[0] == "messages[0]"
    assert error(HI, tools=[{"name": "\ud800"}])[0] == "tools[0].name"
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    assert "nested" in error([{"role": "user", "content": deep}])[1]


def test_no_chat_template() -> None:
    error = rejected("")
    assert (error.param, error.code) == ("messages", "no_chat_template")


def test_odd_but_valid_characters_pass() -> None:
    tokenizer = Tokenizer(sim_tokenizer_spec())
    text = "\0\u0378\ufffe\U0010ffff\u200f"
    assert bytes(tokenizer.encode_text(text)).decode() == text
    assert text.encode() in bytes(
        i for i in tokenizer.encode_chat([{"role": "user", "content": text}]) if i < 256
    )


def test_text_prompts_are_checked() -> None:
    tokenizer = Tokenizer(sim_tokenizer_spec())
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.encode_text("a\ud800", param="prompt[2]")
    assert caught.value.param == "prompt[2]"
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.encode_text("a" * (MAX_TEXT_CHARS + 1))
    assert caught.value.code == "context_length_exceeded"


def test_bos_and_eos_come_from_the_post_processor() -> None:
    spec = with_json(
        byte_spec(("<s>", True)),
        post_processor=template_processing([("<s>", 259)], [("<|im_end|>", 257)]),
    )
    tokenizer = Tokenizer(spec)
    assert tokenizer.encode_text("a<s>") == [259, *b"a<s>", 257]
    assert tokenizer.encode_chat(HI)[:2] == [256, ord("u")]


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    spec = with_json(
        sim_tokenizer_spec(),
        truncation={"max_length": 2, "direction": "Right", "stride": 0, "strategy": "LongestFirst"},
        padding={
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_id": 0,
            "pad_token": "x",
            "pad_type_id": 0,
            "pad_to_multiple_of": None,
        },
    )
    assert Tokenizer(spec).encode_text("abc") == list(b"abc")


def test_added_text_tokens_still_match() -> None:
    tokenizer = Tokenizer(byte_spec(("    ", False), ("hello", False), ("<x>", False)))
    assert tokenizer.encode_text("a    hello<x>") == [ord("a"), 259, 260, *b"<x>"]
    assert tokenizer.token_bytes(259) == b"    "
    assert not tokenizer.is_control(260) and tokenizer.is_control(261)


def test_added_tokens_missing_in_the_model_keep_their_ids() -> None:
    spec = byte_spec(("<a>", True), ("zz", False))
    value = json.loads(spec.tokenizer_json)
    for content in ("<a>", "zz", "<|im_end|>"):
        del value["model"]["vocab"][content]
    tokenizer = Tokenizer(replace(spec, tokenizer_json=json.dumps(value)))
    assert tokenizer.encode_text("zz") == [260]
    assert tokenizer.vocab_size == 261
    assert tokenizer.eos_ids == (257,)


def test_merges_never_lead_to_a_control_token() -> None:
    spec = sim_tokenizer_spec()
    value = json.loads(spec.tokenizer_json)
    value["model"]["vocab"].update({"<|": 259, "<|x": 260, "<|x|>": 261, "|>": 262, "ab": 263})
    value["model"]["merges"] = [["<", "|"], ["<|", "x"], ["|", ">"], ["<|x", "|>"], ["a", "b"]]
    value["added_tokens"].append({**value["added_tokens"][0], "id": 261, "content": "<|x|>"})
    value["pre_tokenizer"]["use_regex"] = False
    for ignore_merges in (False, True):
        value["model"]["ignore_merges"] = ignore_merges
        tokenizer = Tokenizer(replace(spec, tokenizer_json=json.dumps(value)))
        assert tokenizer.encode_text("<|x|>") == [260, 262]
        assert tokenizer.encode_text("ab") == [263]
        assert tokenizer.encode_chat([{"role": "user", "content": "<|x|>"}]).count(261) == 0


def test_a_first_word_gets_its_space_once() -> None:
    fast = trained_sentencepiece()
    template = "{{ messages[0].content }}<s>{{ messages[0].content }}"
    spec = TokenizerSpec(fast.to_str(), template, "<s>", "</s>", "", "<unk>")
    tokenizer = Tokenizer(spec)
    ids = tokenizer.encode_chat([{"role": "user", "content": "the dog"}])
    assert ids == fast.encode("the dog<s>the dog").ids
    assert ids[0] != ids[ids.index(1) + 1]
    assert tokenizer.bos_id == 1


def test_unknown_characters_and_byte_tokens() -> None:
    value = json.loads(trained_sentencepiece().to_str())
    spec = TokenizerSpec(json.dumps(value), "", "<s>", "</s>", "", "<unk>")
    tokenizer = Tokenizer(spec)
    assert tokenizer.encode_text("😀")[1:] == [3 + byte for byte in "😀".encode()]
    assert tokenizer.token_bytes(3 + 0xF0) == b"\xf0"
    assert tokenizer.token_text(3 + 0xF0) == "\ufffd"
    value["model"]["byte_fallback"] = False
    tokenizer = Tokenizer(replace(spec, tokenizer_json=json.dumps(value)))
    assert tokenizer.encode_text("😀")[1:] == [0]


def test_ids_beyond_the_vocabulary_add_nothing() -> None:
    tokenizer = Tokenizer(sim_tokenizer_spec())
    assert tokenizer.token_bytes(100_000) == b""
    assert not tokenizer.is_control(100_000)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"model": {"type": "Unigram", "vocab": []}}',
        '{"model": {"type": "WordLevel", "vocab": {}}}',
        '{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}, '
        '"pre_tokenizer": {"type": "ByteLevel"}}',
    ],
)
def test_unsupported_tokenizers_are_model_file_errors(text: str) -> None:
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        Tokenizer(replace(sim_tokenizer_spec(), tokenizer_json=text))
