"""Token ids of prompts, and what ids mean as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from forebay.core.errors import InvalidRequest
from forebay.text.chat_template import ChatTemplate, TemplateRejected
from forebay.text.client_data import (
    MAX_TEXT_CHARS,
    check_length,
    check_messages,
    check_text,
    rewrite,
    strings_in,
    with_reasoning_aliases,
)
from forebay.text.control import PRIVATE_USE, Placeholders
from forebay.text.spec import TokenizerSpec
from forebay.text.vocabulary import PlainTokenizers, Vocabulary, parse_tokenizer_json


class Tokenizer:
    """Immutable after construction; may be used from several threads.

    Ids equal transformers' for the same files, except that a client's text never yields a
    control token: its spelling is encoded as the plain text it is.
    """

    def __init__(
        self, spec: TokenizerSpec, *, wall_clock: Callable[[], datetime] = datetime.now
    ) -> None:
        """`wall_clock`: local time for templates that print the date. Raises ModelFileError."""
        tokenizer = parse_tokenizer_json(spec.tokenizer_json)
        self._vocabulary = Vocabulary.from_json(tokenizer)
        self._longest_piece = max(map(len, self._vocabulary.pieces), default=1)
        self._plain = PlainTokenizers.from_json(tokenizer, self._vocabulary.control)
        self._template = (
            ChatTemplate(spec.chat_template, wall_clock) if spec.chat_template else None
        )
        self._reserved = frozenset(PRIVATE_USE.findall(spec.chat_template))
        named = {
            "bos_token": spec.bos_token,
            "eos_token": spec.eos_token,
            "pad_token": spec.pad_token,
            "unk_token": spec.unk_token,
        }
        self._special_variables = {name: token for name, token in named.items() if token}
        ids = {text: token_id for token_id, text in self._vocabulary.texts.items()}
        ids = {**tokenizer["model"]["vocab"], **ids}
        self._bos_id: int | None = ids.get(spec.bos_token)
        eos_id = ids.get(spec.eos_token)
        self._eos_ids: tuple[int, ...] = () if eos_id is None else (eos_id,)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's embedding may be padded beyond it."""
        return self._vocabulary.size

    @property
    def bos_id(self) -> int | None:
        return self._bos_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self._eos_ids

    @property
    def strips_leading_space(self) -> bool:
        """Whether a decoded text begins without the space its first token may have in front."""
        return self._vocabulary.strips_space

    def max_chars(self, num_tokens: int) -> int:
        """No text with more characters fits into `num_tokens`: seen before it is encoded, a text
        that is far too long costs nothing."""
        return num_tokens * self._longest_piece

    def encode_text(
        self, text: str, *, param: str = "prompt", max_chars: int = MAX_TEXT_CHARS
    ) -> list[int]:
        """Ids of a completion prompt, with BOS and EOS where the model's tokenizer adds them.
        Raises InvalidRequest naming `param`."""
        check_text(text, param)
        check_length(len(text), param, max_chars)
        ids: list[int] = self._plain.first.encode(text).ids
        return ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        max_chars: int = MAX_TEXT_CHARS,
        **template_kwargs: object,
    ) -> list[int]:
        """Ids of a rendered conversation. `template_kwargs` (tools, documents, enable_thinking...)
        are the client's, too. Raises InvalidRequest for what the template does not accept."""
        if self._template is None:
            raise InvalidRequest(
                "messages: this model has no chat template; use a text prompt",
                param="messages",
                code="no_chat_template",
            )
        check_messages(messages)
        texts = list(strings_in(messages, "messages"))
        for name, value in template_kwargs.items():
            texts.extend(strings_in(value, name))
        num_chars = sum(map(len, texts))
        check_length(num_chars, "messages", max_chars)
        placeholders = self._placeholders(texts)

        def protect(text: str, assistant: bool) -> str:
            return placeholders.protect(text, keep_reasoning=assistant)

        variables = {
            "tools": None,
            "documents": None,
            **self._special_variables,
            **{name: rewrite(value, protect) for name, value in template_kwargs.items()},
            "messages": [
                rewrite(
                    with_reasoning_aliases(message),
                    protect,
                    assistant=message["role"] == "assistant",
                )
                for message in messages
            ],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            prompt = self._template.render(variables, num_client_chars=num_chars)
        except TemplateRejected as error:
            raise InvalidRequest(
                f"messages: the model's chat template rejects them: "
                f"{placeholders.restore(str(error))}",
                param="messages",
                code="template_rejected",
            ) from error
        return self._encode_prompt(prompt, placeholders)

    def _placeholders(self, texts: Sequence[str]) -> Placeholders:
        try:
            return Placeholders(self._vocabulary.control, texts, self._reserved)
        except ValueError as error:
            raise InvalidRequest(
                f"messages: {error}", param="messages", code="invalid_text"
            ) from error

    def _encode_prompt(self, prompt: str, placeholders: Placeholders) -> list[int]:
        ids: list[int] = []
        plain = self._plain.first
        for piece in self._vocabulary.control.split(prompt):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                text = placeholders.restore(piece)
                ids.extend(plain.encode(text, add_special_tokens=False).ids)
            plain = self._plain.later
        return ids

    def is_control(self, token_id: int) -> bool:
        """Whether clients cannot write this token: special ones, and markers like `<think>`."""
        return token_id in self._vocabulary.control.ids

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes (perhaps part of a character) that the token adds to a text; b"" for
        special tokens and ids without a token. Markers that are not flagged special, such as
        `<think>` or `<tool_call>`, are text, as they are to transformers' decoder."""
        return self._vocabulary.pieces[token_id] if token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        """For display: control tokens by name, parts of characters as U+FFFD."""
        name = self._vocabulary.texts.get(token_id)
        return self.token_bytes(token_id).decode(errors="replace") if name is None else name
