from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from text_builders import LLAMA3_PATTERN, trained_byte_level

from forebay.core.errors import ModelFileError
from forebay.text.hf_tokenizer import spec_from_folder
from forebay.text.tokenizer import Tokenizer

FAST = trained_byte_level(LLAMA3_PATTERN)


def folder(path: Path, **files: Any) -> Path:
    """tokenizer.json and the JSON files named (with `_` for the dot's place)."""
    FAST.save(str(path / "tokenizer.json"))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return path


def test_only_tokenizer_json(tmp_path: Path) -> None:
    spec = spec_from_folder(folder(tmp_path))
    assert (spec.bos_token, spec.eos_token, spec.chat_template) == ("", "", "")
    assert Tokenizer(spec).encode_text("the dog 1234") == FAST.encode("the dog 1234").ids


def test_tokens_are_strings_or_objects(tmp_path: Path) -> None:
    config = {
        "bos_token": {"content": "<|im_start|>", "lstrip": False, "__type": "AddedToken"},
        "eos_token": "<|im_end|>",
        "pad_token": None,
    }
    spec = spec_from_folder(folder(tmp_path, tokenizer_config=config))
    assert (spec.bos_token, spec.eos_token, spec.pad_token) == ("<|im_start|>", "<|im_end|>", "")


def test_the_special_tokens_map_fills_gaps(tmp_path: Path) -> None:
    files = {
        "tokenizer_config": {"bos_token": "<|im_start|>"},
        "special_tokens_map": {
            "bos_token": "<|endoftext|>",
            "eos_token": {"content": "<|im_end|>"},
        },
    }
    spec = spec_from_folder(folder(tmp_path, **files))
    assert (spec.bos_token, spec.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_explicit_bos_and_eos_flags(tmp_path: Path) -> None:
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "add_bos_token": True,
        "add_eos_token": False,
    }
    tokenizer = Tokenizer(spec_from_folder(folder(tmp_path, tokenizer_config=config)))
    assert tokenizer.encode_text("the") == [1, *FAST.encode("the").ids]


def test_tokens_only_the_configuration_lists(tmp_path: Path) -> None:
    size = FAST.get_vocab_size()
    entry = {"content": "<|extra|>", "special": True, "lstrip": False, "rstrip": False}
    config = {
        "added_tokens_decoder": {str(size): entry},
        "additional_special_tokens": ["the", {"content": "<|extra|>"}],
        "chat_template": "<|extra|>{{ messages[0].content }}",
    }
    tokenizer = Tokenizer(spec_from_folder(folder(tmp_path, tokenizer_config=config)))
    ids = tokenizer.encode_chat([{"role": "user", "content": "the<|extra|>"}])
    assert ids[0] == size and size not in ids[1:]
    the = FAST.token_to_id("the")
    assert the is None or tokenizer.is_control(the)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", "plain"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool_use", "template": "t"}], ""),
        (None, ""),
    ],
)
def test_chat_templates(tmp_path: Path, template: object, expected: str) -> None:
    path = folder(tmp_path, tokenizer_config={"chat_template": template})
    assert spec_from_folder(path).chat_template == expected


def test_a_template_file_wins(tmp_path: Path) -> None:
    path = folder(tmp_path, tokenizer_config={"chat_template": "old"})
    (path / "chat_template.jinja").write_text("näu", encoding="utf-8")
    assert spec_from_folder(path).chat_template == "näu"


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        spec_from_folder(tmp_path)
    folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ModelFileError, match="not a JSON object"):
        spec_from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"tokenizer_config\.json"):
        spec_from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelFileError, match="not JSON"):
        spec_from_folder(tmp_path)
