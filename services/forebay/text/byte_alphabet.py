"""GPT-2's spelling of the 256 byte values as printable characters, used by byte-level BPE."""

from __future__ import annotations


def _alphabet() -> dict[int, str]:
    """Printable Latin-1 bytes stand for themselves; the others follow from U+0100 in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    spelling = {value: chr(value) for value in printable}
    spelling.update((value, chr(0x100 + index)) for index, value in enumerate(others))
    return spelling


BYTE_TO_CHAR = _alphabet()
CHAR_TO_BYTE = {char: value for value, char in BYTE_TO_CHAR.items()}


def spell(text: str) -> str:
    """The UTF-8 bytes of `text`, one alphabet character each."""
    return "".join(BYTE_TO_CHAR[value] for value in text.encode())


def is_spelled(token: str) -> bool:
    """Whether every character of `token` belongs to the alphabet."""
    return all(char in CHAR_TO_BYTE for char in token)


def unspell(token: str) -> bytes:
    """The bytes that `token` stands for; a token with foreign characters is its own UTF-8."""
    try:
        return bytes([CHAR_TO_BYTE[char] for char in token])
    except KeyError:
        return token.encode()
