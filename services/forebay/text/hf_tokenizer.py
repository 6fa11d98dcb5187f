"""A tokenizer spec from a Hugging Face model folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forebay.core.errors import ModelFileError
from forebay.text.spec import TokenizerSpec
from forebay.text.tokenizer_json import Json, added_token, template_processing
from forebay.text.vocabulary import parse_tokenizer_json

_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


def spec_from_folder(path: Path) -> TokenizerSpec:
    """Reads tokenizer.json, and where present tokenizer_config.json, special_tokens_map.json and
    chat_template.jinja. Raises ModelFileError when tokenizer.json is missing or a file is broken.
    """
    try:
        text = (path / "tokenizer.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path}: tokenizer.json cannot be read ({error})") from error
    tokenizer = dict(parse_tokenizer_json(text))
    config = {
        **_read_object(path / "special_tokens_map.json"),
        **_read_object(path / "tokenizer_config.json"),
    }
    names = {name: _token_text(config.get(name)) for name in _NAMES}
    tokenizer["added_tokens"] = _added_tokens(tokenizer, config, names)
    if "add_bos_token" in config or "add_eos_token" in config:
        tokenizer["post_processor"] = _post_processor(tokenizer, config, names)
    return TokenizerSpec(
        tokenizer_json=json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")),
        chat_template=_chat_template(path, config),
        **names,
    )


def _read_object(path: Path) -> dict[str, Any]:
    """{} for a file that is not there."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: is not a JSON object")
    return value


def _token_text(value: object) -> str:
    """Tokens are written as strings, as AddedToken objects, or null."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    added = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or ()}
    return {**tokenizer["model"]["vocab"], **added}


def _added_tokens(
    tokenizer: Mapping[str, Any], config: Mapping[str, Any], names: Mapping[str, str]
) -> list[Json]:
    """Those of tokenizer.json, those only tokenizer_config.json lists, and named tokens of the
    vocabulary; named tokens are always special."""
    entries: dict[int, Json] = {
        entry["id"]: dict(entry) for entry in tokenizer.get("added_tokens") or ()
    }
    for key, entry in (config.get("added_tokens_decoder") or {}).items():
        entries.setdefault(
            int(key),
            added_token(
                int(key),
                str(entry["content"]),
                special=bool(entry.get("special", False)),
                single_word=bool(entry.get("single_word", False)),
                lstrip=bool(entry.get("lstrip", False)),
                rstrip=bool(entry.get("rstrip", False)),
                normalized=bool(entry.get("normalized", False)),
            ),
        )
    ids = {**_ids(tokenizer), **{str(e["content"]): key for key, e in entries.items()}}
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or ()
    listed = list(more.values()) if isinstance(more, dict) else list(more)
    for token in [*names.values(), *map(_token_text, listed)]:
        token_id = ids.get(token)
        if token and token_id is not None:
            entry = entries.get(token_id) or added_token(token_id, token, special=True)
            entries[token_id] = {**entry, "special": True}
    return [entries[token_id] for token_id in sorted(entries)]


def _post_processor(
    tokenizer: Mapping[str, Any], config: Mapping[str, Any], names: Mapping[str, str]
) -> Json:
    """What transformers puts around a text when the configuration says so explicitly."""
    ids = _ids(tokenizer)

    def named(kind: str) -> list[tuple[str, int]]:
        token = names[f"{kind}_token"]
        wanted = config.get(f"add_{kind}_token", False) and token in ids
        return [(token, ids[token])] if wanted else []

    return template_processing(named("bos"), named("eos"))


def _chat_template(path: Path, config: Mapping[str, Any]) -> str:
    """chat_template.jinja wins over the configuration; of named templates, `default` is taken."""
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFileError(f"{file}: cannot be read ({error})") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else ""
