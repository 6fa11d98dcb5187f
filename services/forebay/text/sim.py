"""A tokenizer for the sim engine, which has no weights and no model files."""

from __future__ import annotations

import json

from forebay.text.byte_alphabet import BYTE_TO_CHAR
from forebay.text.spec import TokenizerSpec
from forebay.text.tokenizer_json import added_token, bpe_model, byte_level, tokenizer_json

_CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sim_tokenizer_spec() -> TokenizerSpec:
    """Ids 0 to 255 are the byte values; <|im_start|>, <|im_end|>, <|endoftext|> follow."""
    vocab = {char: value for value, char in BYTE_TO_CHAR.items()}
    control = {token: 256 + index for index, token in enumerate(_CONTROL_TOKENS)}
    tokenizer = tokenizer_json(
        model=bpe_model({**vocab, **control}, []),
        added_tokens=[
            added_token(token_id, token, special=True) for token, token_id in control.items()
        ],
        pre_tokenizer=byte_level(),
        decoder=byte_level(),
        post_processor=None,
    )
    return TokenizerSpec(
        tokenizer_json=json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")),
        chat_template=_CHAT_TEMPLATE,
        bos_token="",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="",
    )
