"""What a gateway needs to tokenize for a model it has no files of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields

from forebay.core.errors import ModelFileError


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """Made by workers (and the sim engine), sent to gateways as bytes.

    tokenizer_json: what Hugging Face `tokenizers` reads. chat_template: jinja2 source.
    A token or template that the model does not have is an empty string.
    """

    tokenizer_json: str
    chat_template: str
    bos_token: str
    eos_token: str
    pad_token: str
    unk_token: str

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal specs give equal bytes, so their hash identifies them."""
        return json.dumps(
            asdict(self), sort_keys=True, ensure_ascii=False, separators=(",", ":")
        ).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> TokenizerSpec:
        """Raises ModelFileError unless `data` is what `to_bytes` gives."""
        try:
            values = json.loads(data)
        except ValueError as error:
            raise ModelFileError(f"tokenizer spec: not JSON ({error})") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ModelFileError(f"tokenizer spec: needs exactly the fields {sorted(names)}")
        if not all(isinstance(value, str) for value in values.values()):
            raise ModelFileError("tokenizer spec: every field must be a string")
        return cls(**values)

    @property
    def hash(self) -> str:
        """sha256 of `to_bytes`, in hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()
