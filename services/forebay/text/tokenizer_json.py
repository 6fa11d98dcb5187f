"""Parts of Hugging Face's tokenizer.json, for those who write one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Json = dict[str, object]


def added_token(
    token_id: int,
    content: str,
    *,
    special: bool,
    single_word: bool = False,
    lstrip: bool = False,
    rstrip: bool = False,
    normalized: bool = False,
) -> Json:
    return {
        "id": token_id,
        "content": content,
        "single_word": single_word,
        "lstrip": lstrip,
        "rstrip": rstrip,
        "normalized": normalized,
        "special": special,
    }


def byte_level(*, use_regex: bool = True) -> Json:
    """Serves as a pre-tokenizer and as a decoder. `use_regex` cuts words as GPT-2 does."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def bpe_model(
    vocab: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    *,
    byte_fallback: bool = False,
    unk_token: str | None = None,
) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": dict(vocab),
        "merges": [list(merge) for merge in merges],
    }


def template_processing(
    prefix: Sequence[tuple[str, int]], suffix: Sequence[tuple[str, int]]
) -> Json:
    """A post-processor that puts (token, id) pairs before and after a text."""

    def special(token: str) -> Json:
        return {"SpecialToken": {"id": token, "type_id": 0}}

    def around(sequence: str) -> list[Json]:
        text: Json = {"Sequence": {"id": sequence, "type_id": 0}}
        return [*(special(t) for t, _ in prefix), text, *(special(t) for t, _ in suffix)]

    return {
        "type": "TemplateProcessing",
        "single": around("A"),
        "pair": [*around("A"), *around("B")],
        "special_tokens": {
            token: {"id": token, "ids": [token_id], "tokens": [token]}
            for token, token_id in [*prefix, *suffix]
        },
    }


def tokenizer_json(
    *,
    model: Json,
    added_tokens: Sequence[Json],
    pre_tokenizer: Json,
    decoder: Json,
    post_processor: Json | None,
) -> Json:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added_tokens),
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": model,
    }
