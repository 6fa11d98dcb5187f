"""What a tokenizer.json says about each id, and the tokenizer that reads plain text only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer as FastTokenizer

from forebay.core.errors import ModelFileError
from forebay.text.byte_alphabet import unspell
from forebay.text.control import AddedToken, ControlTokens

_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")

Spelling = Literal["byte_level", "sentencepiece"]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """pieces: the bytes each id adds to a text, b"" for special tokens and unused ids.
    texts: spellings of added tokens. strips_space: a decoded text loses one leading space."""

    size: int
    pieces: tuple[bytes, ...]
    texts: Mapping[int, str]
    control: ControlTokens
    strips_space: bool

    @classmethod
    def from_json(cls, tokenizer: Mapping[str, Any]) -> Vocabulary:
        """Raises ModelFileError unless it is a BPE, byte-level or SentencePiece-like."""
        spelling = _spelling(tokenizer)
        vocab: Mapping[str, int] = tokenizer["model"]["vocab"]
        added = [_added_token(entry) for entry in tokenizer.get("added_tokens") or ()]
        size = 1 + max([*vocab.values(), *(token.id for token in added)], default=-1)
        pieces = [b""] * size
        for token, token_id in vocab.items():
            pieces[token_id] = _piece(token, spelling, tokenizer["model"])
        control = ControlTokens(added)
        for entry in added:
            hidden = entry.special and entry.is_control
            pieces[entry.id] = b"" if hidden else entry.content.encode()
        return cls(
            size=size,
            pieces=tuple(pieces),
            texts={token.id: token.content for token in added},
            control=control,
            strips_space=_strips_space(tokenizer.get("decoder")),
        )


@dataclass(frozen=True, slots=True)
class PlainTokenizers:
    """Encoders to which a control token's spelling is text like any other.

    first: for a text, or the span with which a prompt begins. later: for spans after a control
    token; differs where only a prompt's first word gets a space in front.
    """

    first: FastTokenizer
    later: FastTokenizer

    @classmethod
    def from_json(cls, tokenizer: Mapping[str, Any], control: ControlTokens) -> PlainTokenizers:
        """Control tokens leave the added tokens, and the model: no merge leads to them, and their
        vocabulary entries end in a space, which never reaches a model that spells spaces
        differently. The ids of all other tokens stay."""
        model = dict(tokenizer["model"])
        entries: list[Mapping[str, Any]] = list(tokenizer.get("added_tokens") or ())
        hidden = {entry["content"] for entry in entries if entry["id"] in control.ids}
        vocab = {
            token + " " if token in hidden else token: token_id
            for token, token_id in model["vocab"].items()
        }
        kept = [entry for entry in entries if entry["content"] not in hidden]
        vocab.update((entry["content"], entry["id"]) for entry in kept)
        model["vocab"] = vocab
        model["merges"] = [
            merge
            for merge in model["merges"]
            if hidden.isdisjoint(_merge_parts(merge)) and "".join(_merge_parts(merge)) not in hidden
        ]
        if model.get("unk_token") in hidden:
            model["unk_token"] += " "
        plain = {
            **tokenizer,
            "model": model,
            "added_tokens": kept,
            "truncation": None,
            "padding": None,
        }
        first = _load(plain)
        if not _prepends_first_only(tokenizer.get("pre_tokenizer")):
            return cls(first, first)
        return cls(first, _load({**plain, "pre_tokenizer": _never_prepending(plain)}))


def parse_tokenizer_json(text: str) -> Mapping[str, Any]:
    """Raises ModelFileError unless `text` is a tokenizer.json with a BPE model."""
    try:
        tokenizer = json.loads(text)
    except ValueError as error:
        raise ModelFileError(f"tokenizer.json is not JSON ({error})") from error
    model = tokenizer.get("model") if isinstance(tokenizer, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise ModelFileError("tokenizer.json holds no BPE vocabulary")
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise ModelFileError(
            f"tokenizer.json: model {model.get('type')!r} is not supported; BPE is"
        )
    assert isinstance(tokenizer, dict)
    return tokenizer


def _load(tokenizer: Mapping[str, Any]) -> FastTokenizer:
    try:
        return FastTokenizer.from_str(json.dumps(tokenizer, ensure_ascii=False))
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelFileError(f"tokenizer.json cannot be loaded: {error}") from error


def _merge_parts(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    return AddedToken(
        id=int(entry["id"]),
        content=str(entry["content"]),
        special=bool(entry.get("special", False)),
        single_word=bool(entry.get("single_word", False)),
        lstrip=bool(entry.get("lstrip", False)),
        rstrip=bool(entry.get("rstrip", False)),
        normalized=bool(entry.get("normalized", False)),
    )


def _nested(part: Any) -> Iterator[Mapping[str, Any]]:
    """A normalizer, pre-tokenizer or decoder and those inside it."""
    if isinstance(part, dict):
        yield part
        for key in ("normalizers", "pretokenizers", "decoders"):
            for inner in part.get(key) or ():
                yield from _nested(inner)


def _spelling(tokenizer: Mapping[str, Any]) -> Spelling:
    steps = [*_nested(tokenizer.get("normalizer")), *_nested(tokenizer.get("pre_tokenizer"))]
    if any(step["type"] == "ByteLevel" for step in steps):
        return "byte_level"
    if any(
        step["type"] == "Metaspace" or (step["type"] == "Replace" and step["content"] == _SPACE)
        for step in steps
    ):
        return "sentencepiece"
    raise ModelFileError("tokenizer.json is neither byte-level nor SentencePiece-like")


def _piece(token: str, spelling: Spelling, model: Mapping[str, Any]) -> bytes:
    if spelling == "byte_level":
        return unspell(token)
    if model.get("byte_fallback") and (match := _BYTE_TOKEN.fullmatch(token)):
        return bytes([int(match.group(1), 16)])
    return token.replace(_SPACE, " ").encode()


def _strips_space(decoder: Any) -> bool:
    for step in _nested(decoder):
        if step["type"] == "Strip" and step["content"] == " " and step["start"] > 0:
            return True
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return True
    return False


def _prepends_first_only(pre_tokenizer: Any) -> bool:
    return any(
        step["type"] == "Metaspace" and step.get("prepend_scheme") == "first"
        for step in _nested(pre_tokenizer)
    )


def _never_prepending(tokenizer: Mapping[str, Any]) -> Any:
    copy = json.loads(json.dumps(tokenizer["pre_tokenizer"]))
    for step in _nested(copy):
        if step["type"] == "Metaspace":
            assert isinstance(step, dict)
            step["prepend_scheme"] = "never"
    return copy
