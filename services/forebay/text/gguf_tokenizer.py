"""A tokenizer spec from the metadata of a GGUF file.

Ids equal those of transformers' `AutoTokenizer.from_pretrained(folder, gguf_file=...)` wherever
that gives the model a usable tokenizer; it does not for DeepSeek's cuts and for control tokens
spelled with characters outside the byte alphabet, where the model's own tokenizer is followed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import gguf

from forebay.core.errors import ModelFileError
from forebay.text.byte_alphabet import is_spelled, spell
from forebay.text.pre_tokenizers import byte_level_pre_tokenizer
from forebay.text.spec import TokenizerSpec
from forebay.text.tokenizer_json import (
    Json,
    added_token,
    bpe_model,
    byte_level,
    template_processing,
    tokenizer_json,
)

_SPACE = "\u2581"


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def spec_from_gguf(path: Path) -> TokenizerSpec:
    """Raises ModelFileError when the file is missing, not GGUF, or of an unsupported tokenizer."""
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise ModelFileError(f"{path}: cannot be read as GGUF ({error})") from error
    return spec_from_gguf_reader(reader)


def spec_from_gguf_reader(reader: gguf.GGUFReader) -> TokenizerSpec:
    """The same from a file that is open already (the engine's)."""
    try:
        metadata = _Metadata.read(reader)
    except (ValueError, IndexError) as error:
        raise ModelFileError(f"the GGUF file's tokenizer cannot be read ({error})") from error
    return _spec(metadata)


@dataclass(frozen=True, slots=True)
class _Metadata:
    """The `tokenizer.*` keys. special_ids: those of bos, eos, unknown, padding the file has."""

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str] | None
    special_ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str

    @classmethod
    def read(cls, reader: gguf.GGUFReader) -> _Metadata:
        def value(key: str, default: object) -> object:
            field = reader.fields.get(key)
            return default if field is None else field.contents()

        tokens = value("tokenizer.ggml.tokens", None)
        if not isinstance(tokens, list) or not tokens:
            raise ModelFileError("the GGUF file holds no tokenizer (tokenizer.ggml.tokens)")
        model = str(value("tokenizer.ggml.model", ""))
        types = value("tokenizer.ggml.token_type", None) or [int(TokenType.NORMAL)] * len(tokens)
        scores = value("tokenizer.ggml.scores", None) or [0.0] * len(tokens)
        merges = value("tokenizer.ggml.merges", None)
        assert isinstance(types, list) and isinstance(scores, list)
        if len(types) != len(tokens) or len(scores) != len(tokens):
            raise ModelFileError("tokenizer.ggml.tokens, token_type and scores differ in length")
        special_ids: dict[str, int] = {}
        for name in ("bos", "eos", "unknown", "padding"):
            token_id = value(f"tokenizer.ggml.{name}_token_id", None)
            if isinstance(token_id, int) and 0 <= token_id < len(tokens):
                special_ids[name] = token_id
        return cls(
            model=model,
            pre=str(value("tokenizer.ggml.pre", "default")),
            tokens=tokens,
            types=types,
            scores=scores,
            merges=merges if isinstance(merges, list) else None,
            special_ids=special_ids,
            add_bos=bool(value("tokenizer.ggml.add_bos_token", model == "llama")),
            add_eos=bool(value("tokenizer.ggml.add_eos_token", False)),
            add_space_prefix=bool(value("tokenizer.ggml.add_space_prefix", True)),
            chat_template=str(value("tokenizer.chat_template", "")),
        )

    def special(self, name: str) -> str:
        token_id = self.special_ids.get(name)
        return "" if token_id is None else self.tokens[token_id]


def _spec(metadata: _Metadata) -> TokenizerSpec:
    if metadata.model == "gpt2":
        pre_tokenizer, model, decoder = _byte_level_parts(metadata)
    elif metadata.model == "llama":
        pre_tokenizer, model, decoder = _sentencepiece_parts(metadata)
    else:
        raise ModelFileError(
            f"tokenizer.ggml.model {metadata.model!r} is not supported; known: gpt2, llama"
        )
    tokenizer = tokenizer_json(
        model=model,
        added_tokens=_added_tokens(metadata),
        pre_tokenizer=pre_tokenizer,
        decoder=decoder,
        post_processor=_post_processor(metadata),
    )
    return TokenizerSpec(
        tokenizer_json=json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")),
        chat_template=metadata.chat_template,
        bos_token=metadata.special("bos"),
        eos_token=metadata.special("eos"),
        pad_token=metadata.special("padding"),
        unk_token=metadata.special("unknown"),
    )


def _is_added(metadata: _Metadata, token_id: int) -> bool:
    return (
        metadata.types[token_id] in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
        or token_id in metadata.special_ids.values()
    )


def _added_tokens(metadata: _Metadata) -> list[Json]:
    """Control and named tokens are special; user-defined ones (`<think>`) are not."""
    return [
        added_token(
            token_id,
            token,
            special=metadata.types[token_id] != TokenType.USER_DEFINED
            or token_id in metadata.special_ids.values(),
        )
        for token_id, token in enumerate(metadata.tokens)
        if _is_added(metadata, token_id)
    ]


def _post_processor(metadata: _Metadata) -> Json:
    def named(name: str, wanted: bool) -> list[tuple[str, int]]:
        if not wanted or name not in metadata.special_ids:
            return []
        return [(metadata.special(name), metadata.special_ids[name])]

    return template_processing(named("bos", metadata.add_bos), named("eos", metadata.add_eos))


def _byte_level_parts(metadata: _Metadata) -> tuple[Json, Json, Json]:
    """Pre-tokenizer, model, decoder. Merged tokens are spelled in the byte alphabet, added ones
    as they are."""
    if metadata.merges is None:
        raise ModelFileError("the GGUF file holds no merges (tokenizer.ggml.merges)")
    vocab = {
        token if _is_added(metadata, token_id) or is_spelled(token) else spell(token): token_id
        for token_id, token in enumerate(metadata.tokens)
    }
    merges = [merge.split(" ") for merge in metadata.merges]
    return byte_level_pre_tokenizer(metadata.pre), bpe_model(vocab, merges), byte_level()


def _sentencepiece_parts(metadata: _Metadata) -> tuple[Json, Json, Json]:
    """Pre-tokenizer, model, decoder."""
    vocab = {token: token_id for token_id, token in enumerate(metadata.tokens)}
    if metadata.merges is not None:
        merges = [merge.split(" ") for merge in metadata.merges]
    else:
        merges = _merges_from_scores(vocab, metadata.scores, metadata.types)
    pre_tokenizer: Json = {
        "type": "Metaspace",
        "replacement": _SPACE,
        "prepend_scheme": "first" if metadata.add_space_prefix else "never",
        "split": False,
    }
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if metadata.add_space_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = bpe_model(
        vocab, merges, byte_fallback=True, unk_token=metadata.special("unknown") or None
    )
    return pre_tokenizer, model, {"type": "Sequence", "decoders": decoders}


def _merges_from_scores(
    vocab: Mapping[str, int], scores: Sequence[float], types: Sequence[int]
) -> list[list[str]]:
    """SentencePiece joins the pair whose result scores best: as ranked merges, every way to cut a
    token into two others, best result first, then the longer left and right part."""
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, token_id in vocab.items():
        if types[token_id] not in (TokenType.NORMAL, TokenType.USER_DEFINED):
            continue
        cuts = sorted(
            (vocab[token[:cut]], vocab[token[cut:]], cut)
            for cut in range(1, len(token))
            if token[:cut] in vocab and token[cut:] in vocab
        )
        for _, _, cut in cuts:
            ranked.append((scores[token_id], cut, len(token) - cut, token[:cut], token[cut:]))
    ranked.sort(key=lambda merge: merge[:3], reverse=True)
    return [[left, right] for _, _, _, left, right in ranked]
