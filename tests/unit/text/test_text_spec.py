from __future__ import annotations

import hashlib
import json

import pytest

from forebay.core.errors import ModelFileError
from forebay.text.spec import TokenizerSpec

SPEC = TokenizerSpec("{}", "{{ 'ü' }}", "<s>", "</s>", "", "<unk>")


def test_bytes_round_trip() -> None:
    assert TokenizerSpec.from_bytes(SPEC.to_bytes()) == SPEC


def test_bytes_are_canonical_utf8_json() -> None:
    data = SPEC.to_bytes()
    assert "ü".encode() in data
    assert list(json.loads(data)) == sorted(json.loads(data))
    assert SPEC.hash == hashlib.sha256(data).hexdigest()


def test_every_field_changes_the_hash() -> None:
    hashes = {SPEC.hash}
    for name, value in json.loads(SPEC.to_bytes()).items():
        changed = {**json.loads(SPEC.to_bytes()), name: value + "x"}
        hashes.add(TokenizerSpec(**changed).hash)
    assert len(hashes) == 7


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"[]", b"{}", b'{"tokenizer_json": 1}'],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ModelFileError, match="tokenizer spec"):
        TokenizerSpec.from_bytes(data)


def test_fields_must_be_strings() -> None:
    values = {**json.loads(SPEC.to_bytes()), "bos_token": None}
    with pytest.raises(ModelFileError, match="string"):
        TokenizerSpec.from_bytes(json.dumps(values).encode())
