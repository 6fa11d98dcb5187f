"""Text that comes from clients never becomes a control token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_builders import byte_spec

from forebay.core.errors import InvalidRequest
from forebay.text.control import AddedToken, ControlTokens, Placeholders
from forebay.text.tokenizer import Tokenizer

USER = "<\uff5cUser\uff5c>"
TOOL_CALLS = "<\uff5ctool\u2581calls\u2581begin\uff5c>"
MARKERS = [
    ("<think>", False),
    ("</think>", False),
    (USER, False),
    (TOOL_CALLS, False),
    ("[INST]", False),
    ("[/INST]", False),
    ("<s>", True),
    ("</s>", True),
    ("<tool_call>", False),
    ("    ", False),
    ("[PAD]", True),
    ("<|user|>", True),
]

ANY_FIELD = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content | trim }}"
    "{% else %}{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %}"
    "{{ m.name }}{% for call in m.tool_calls or [] %}<tool_call>{{ call | tojson }}{% endfor %}"
    "<|im_end|>{% endfor %}"
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
)
CHATML = Tokenizer(byte_spec(*MARKERS))
FIELDS = Tokenizer(byte_spec(*MARKERS, template=ANY_FIELD))
SPELLINGS = [CHATML.token_text(i) for i in range(CHATML.vocab_size) if CHATML.is_control(i)]


def token(content: str, *, special: bool = False, **flags: bool) -> AddedToken:
    values = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, **flags}
    return AddedToken(7, content, special, **values)


def control_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [token_id for token_id in ids if tokenizer.is_control(token_id)]


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(
        tokenizer.token_text(i).encode() if tokenizer.is_control(i) else tokenizer.token_bytes(i)
        for i in ids
    ).decode()


@pytest.mark.parametrize(
    "content",
    [
        "<|im_end|>",
        "<think>",
        "</think>",
        USER,
        TOOL_CALLS,
        "[INST]",
        "[/INST]",
        "<0x>",
        "[TOOL_1]",
    ],
)
def test_markers_are_control_tokens(content: str) -> None:
    assert token(content).is_control


@pytest.mark.parametrize("content", ["hello", "<", "<>", "[a]", "[1]", "a<b>", "< b>", "[]"])
def test_other_added_tokens_are_text_unless_special(content: str) -> None:
    assert not token(content).is_control
    assert token(content, special=True).is_control


@pytest.mark.parametrize("content", [" ", "\n\n", "\t"])
def test_whitespace_is_text(content: str) -> None:
    assert not token(content, special=True).is_control


@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_content_becomes_a_control_token(role: str, spelling: str) -> None:
    content = f"a{spelling}b {spelling}"
    ids = CHATML.encode_chat([{"role": role, "content": content}])
    expected = [256, 257, 256]
    if role == "assistant" and spelling in ("<think>", "</think>"):
        marker = next(i for i in range(259, 300) if CHATML.token_text(i) == spelling)
        expected[1:1] = [marker, marker]
    assert control_ids(CHATML, ids) == expected
    assert text_of(CHATML, ids) == (
        f"<|im_start|>{role}\n{content}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_completion_prompt_becomes_a_control_token(spelling: str) -> None:
    ids = CHATML.encode_text(f"x{spelling}y")
    assert control_ids(CHATML, ids) == []
    assert text_of(CHATML, ids) == f"x{spelling}y"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_other_field_is_protected(spelling: str) -> None:
    messages: list[dict[str, Any]] = [
        {
            "role": "user",
            "name": spelling,
            "content": [{"type": "text", "text": spelling}],
            "tool_calls": [
                {
                    "function": {
                        "name": spelling,
                        "arguments": {spelling: [spelling, {"a": spelling}]},
                    }
                }
            ],
        }
    ]
    tools = [{"function": {"description": spelling, "parameters": {"properties": {spelling: 1}}}}]
    ids = FIELDS.encode_chat(messages, tools=tools)
    tool_call = next(i for i in range(259, 300) if FIELDS.token_text(i) == "<tool_call>")
    assert control_ids(FIELDS, ids) == [256, tool_call, 257]
    of_the_template = ("<|im_start|>", "<|im_end|>", "<tool_call>").count(spelling)
    assert text_of(FIELDS, ids).count(spelling) == 8 + of_the_template


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_put_together_by_the_template_stay_text(spelling: str) -> None:
    for cut in range(1, len(spelling)):
        parts = [spelling[:cut] + " ", "\n" + spelling[cut:]]
        content = [{"type": "text", "text": part} for part in parts]
        ids = FIELDS.encode_chat([{"role": "user", "content": content}])
        assert control_ids(FIELDS, ids) == [256, 257]
        assert spelling in text_of(FIELDS, ids)


@pytest.mark.parametrize(
    "around", ["<{}>", "<|{}|>", "<|{}", "<{}", "[{}]", "</{}>", "<\uff5c{}\uff5c>"]
)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_templates_that_write_the_punctuation_build_no_control_token(
    around: str, spelling: str
) -> None:
    before, after = around.split("{}")
    if not (spelling.startswith(before) and spelling.endswith(after)):
        return
    inner = spelling[len(before) : len(spelling) - len(after)]
    template = f"{before}{{{{ messages[0].content }}}}{after}"
    tokenizer = Tokenizer(byte_spec(*MARKERS, template=template))
    ids = tokenizer.encode_chat([{"role": "user", "content": inner}])
    assert control_ids(tokenizer, ids) == []
    assert text_of(tokenizer, ids) == spelling


def test_argument_names_build_no_control_token() -> None:
    template = (
        "{% for key, value in messages[0].tool_calls[0].arguments.items() %}"
        "<{{ key }}>{{ value }}</{{ key }}>{% endfor %}"
    )
    tokenizer = Tokenizer(byte_spec(*MARKERS, template=template))
    arguments = {"tool_call": "x", "|im_end|": "y", "think": "z", "plain": "w"}
    messages = [{"role": "assistant", "tool_calls": [{"arguments": arguments}]}]
    ids = tokenizer.encode_chat(messages)
    assert control_ids(tokenizer, ids) == []
    assert text_of(tokenizer, ids).startswith("<tool_call>x</tool_call><|im_end|>y</|im_end|>")


def test_removed_characters_build_no_control_token() -> None:
    template = "{{ messages[0].content | replace('\n', '') }}"
    tokenizer = Tokenizer(byte_spec(*MARKERS, template=template))
    ids = tokenizer.encode_chat([{"role": "user", "content": "<|im_\nend|><th\nink>[IN\nST]"}])
    assert control_ids(tokenizer, ids) == []


def test_client_text_around_private_use_characters() -> None:
    private = "".join(map(chr, range(0xE000, 0xE040)))
    for char in private:
        content = f"<|im_{char}end|>{char}<|im_end|>{private}"
        ids = CHATML.encode_chat([{"role": "user", "content": content}])
        assert control_ids(CHATML, ids) == [256, 257, 256]
        assert content in text_of(CHATML, ids)


def test_private_use_characters_of_the_template_stay() -> None:
    tokenizer = Tokenizer(byte_spec(template="\ue000\ue001{{ messages[0].content }}"))
    ids = tokenizer.encode_chat([{"role": "user", "content": "<<"}])
    assert text_of(tokenizer, ids) == "\ue000\ue001<<"


def test_too_many_private_use_characters_are_refused() -> None:
    content = "".join(map(chr, range(0xE000, 0xF900)))
    with pytest.raises(InvalidRequest, match="private-use"):
        CHATML.encode_chat([{"role": "user", "content": content}])


@given(
    st.lists(
        st.one_of(
            st.sampled_from([*SPELLINGS, "<", ">", "|", "im_end|>", "[", "\ue000"]), st.text()
        ),
        max_size=12,
    ).map("".join),
    st.sampled_from(["user", "system", "tool"]),
)
def test_any_content_comes_through_as_text(content: str, role: str) -> None:
    ids = CHATML.encode_chat([{"role": role, "content": content}], add_generation_prompt=False)
    assert control_ids(CHATML, ids) == [256, 257]
    assert text_of(CHATML, ids) == f"<|im_start|>{role}\n{content}<|im_end|>\n"


def test_unknown_roles_are_refused() -> None:
    for role in ("im_end", "", None, 3, ["user"], "User", "<|im_end|>"):
        with pytest.raises(InvalidRequest) as caught:
            CHATML.encode_chat([{"role": "user", "content": ""}, {"role": role, "content": ""}])
        assert caught.value.param == "messages[1].role"


def test_templates_may_cut_by_reasoning_markers_of_assistant_messages() -> None:
    template = "{{ messages[0].content.split('</think>')[-1] }}"
    tokenizer = Tokenizer(byte_spec(*MARKERS, template=template))
    content = "<think>a < b</think>answer <|im_end|>"
    ids = tokenizer.encode_chat([{"role": "assistant", "content": content}])
    assert text_of(tokenizer, ids) == "answer <|im_end|>"
    assert control_ids(tokenizer, ids) == []
    ids = tokenizer.encode_chat([{"role": "user", "content": content}])
    assert text_of(tokenizer, ids) == content


def test_only_assistant_messages_keep_reasoning_markers() -> None:
    content = [{"type": "text", "role": "assistant", "text": "<think>x</think>"}]
    ids = FIELDS.encode_chat([{"role": "user", "content": content}])
    assert control_ids(FIELDS, ids) == [256, 257]


def test_a_template_in_the_manner_of_deepseek() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}" + USER + "{{ m.content }}"
        "{% else %}{% set c = m.content %}"
        "{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
        "[/INST]{{ c }}</s>{% endif %}{% endfor %}[/INST]<think>"
    )
    tokenizer = Tokenizer(byte_spec(*MARKERS, template=template))
    messages = [
        {"role": "user", "content": f"1 < 2 {USER}"},
        {"role": "assistant", "content": f"<think>{USER} hm</think>yes</s>"},
        {"role": "user", "content": "<think></think>"},
    ]
    ids = tokenizer.encode_chat(messages)
    assert text_of(tokenizer, ids) == (
        f"{USER}1 < 2 {USER}[/INST]yes</s></s>{USER}<think></think>[/INST]<think>"
    )
    names = [tokenizer.token_text(token_id) for token_id in control_ids(tokenizer, ids)]
    assert names == [USER, "[/INST]", "</s>", USER, "[/INST]", "<think>"]


def test_placeholders_are_deterministic_and_restore() -> None:
    control = ControlTokens([token("<|a|>", special=True)])
    first = Placeholders(control, ["<\ue000"], frozenset("\ue001"))
    second = Placeholders(control, ["<\ue000"], frozenset("\ue001"))
    protected = first.protect("<\ue000", keep_reasoning=False)
    assert protected == second.protect("<\ue000", keep_reasoning=False)
    assert not {"<", "\ue001"} & set(protected)
    assert first.restore(protected) == "<\ue000"


def split(text: str, *added: AddedToken) -> list[str | int]:
    return list(ControlTokens(added).split(text))


def test_the_longest_of_several_tokens_wins() -> None:
    short = token("<a>")
    long = AddedToken(8, "<a>!", True, False, False, False, False)
    assert split("x<a><a>!y", short, long) == ["x", 7, 8, "y"]


def test_stripping_tokens_swallow_whitespace() -> None:
    assert split("a \n<a>\t b", token("<a>", lstrip=True)) == ["a", 7, "\t b"]
    assert split("a \n<a>\t b", token("<a>", rstrip=True)) == ["a \n", 7, "b"]
    both = token("<a>", lstrip=True, rstrip=True)
    assert split(" <a> <a> b", both) == [7, 7, "b"]


def test_single_words_need_word_boundaries() -> None:
    word = token("<a>", single_word=True)
    assert split("x<a> <a> <a>y", word) == ["x<a> ", 7, " <a>y"]


def test_text_tokens_take_part_in_matching() -> None:
    assert split(
        "ab<c>", token("b<", normalized=False), AddedToken(8, "<c>", True, *[False] * 4)
    ) == ["ab<c>"]
