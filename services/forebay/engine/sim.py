"""The sim engine: no weights, modelled step times, seeded nonsense for answers.

It carries the control plane's tests and load runs. Its KV is real in one respect: every token
leaves an 8-byte digest of (token, position, layer) in its slot of every layer, and the next token
is a function of all digests of the context, read back through the block table. KV that is lost,
stale, cut or mixed up therefore changes the answer, as it would with a model.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Sequence as Seq
from functools import cache

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from forebay.core.errors import KvTransferError
from forebay.core.kv_codec import KvCodec
from forebay.engine.interface import (
    Batch,
    KvSlice,
    LayerHook,
    SampledToken,
    ScheduledSequence,
    StepResult,
)
from forebay.engine.profile import StepProfile
from forebay.rpc.v1 import worker_pb2
from forebay.text.sim import sim_tokenizer_spec
from forebay.text.spec import TokenizerSpec
from forebay.text.tokenizer import Tokenizer

NUM_LAYERS = 4
DIGEST_BYTES = 8
LAYOUT_VERSION = 1
_ALPHABET = b"abcdefghijklmnopqrstuvwxyz     "
_MASK = (1 << 64) - 1
_MIX_ADD = np.uint64(0x9E3779B97F4A7C15)
_MIX_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_MIX_SECOND = np.uint64(0x94D049BB133111EB)
_SHIFT_27, _SHIFT_30, _SHIFT_31 = np.uint64(27), np.uint64(30), np.uint64(31)

Digests = npt.NDArray[np.uint64]


class SimRunner:
    """Implements `Runner`. `mean_output_tokens`: answers are geometric with this mean, cut by
    max_tokens. `time_scale` multiplies the profile's times. `crash_text`: unless empty, computing a
    prompt that contains it ends this process as SIGKILL does."""

    def __init__(
        self,
        *,
        model_id: str,
        block_size: int,
        num_blocks: int,
        max_model_len: int,
        profile: StepProfile,
        time_scale: float,
        mean_output_tokens: int,
        crash_text: bytes = b"",
    ) -> None:
        spec, tokenizer = _tokenizer()
        self._tokenizer_spec = spec.to_bytes()
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._profile = profile
        self._time_scale = time_scale
        self._crash_text = list(crash_text)
        self._end_below = int(2**64 / max(1, mean_output_tokens))
        (self._eos,) = tokenizer.eos_ids
        self._memory: Digests = np.zeros((NUM_LAYERS, num_blocks, block_size), dtype=np.uint64)
        self._salts = _mix(np.arange(1, NUM_LAYERS + 1, dtype=np.uint64))
        self._model = worker_pb2.ModelInfo(
            id=model_id,
            revision="sim-1",
            tokenizer_hash=spec.hash,
            vocab_size=tokenizer.vocab_size,
            max_model_len=min(max_model_len, num_blocks * block_size),
            eos_token_ids=[self._eos],
            engine="sim",
        )
        self._layout = worker_pb2.KvLayout(
            version=LAYOUT_VERSION,
            num_layers=NUM_LAYERS,
            num_kv_heads=1,
            head_dim=1,
            dtype=worker_pb2.KV_DTYPE_SIM,
            block_size=block_size,
            bytes_per_token_layer=DIGEST_BYTES,
        )

    @property
    def model(self) -> worker_pb2.ModelInfo:
        return self._model

    @property
    def kv_layout(self) -> worker_pb2.KvLayout:
        return self._layout

    @property
    def kv_codecs(self) -> tuple[KvCodec, ...]:
        return (KvCodec.RAW,)

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def tokenizer_spec(self) -> bytes:
        return self._tokenizer_spec

    def run(self, batch: Batch, on_layer: LayerHook | None = None) -> StepResult:
        for source, target in batch.block_copies:
            self._memory[:, target] = self._memory[:, source]
        for item in batch.sequences:
            if self._crash_text and _contains(item.tokens, self._crash_text):
                os.kill(os.getpid(), signal.SIGKILL)
            self._write(item)
        if on_layer is not None and batch.sequences:
            for layer in range(NUM_LAYERS):
                on_layer(layer)
        tokens = tuple(self._sample(item) if item.choices else () for item in batch.sequences)
        return StepResult(tokens, self._profile.step(batch) * self._time_scale)

    def kv_payload_bytes(self, part: KvSlice, codec: KvCodec) -> int:
        if codec is not KvCodec.RAW:
            raise KvTransferError(f"the sim engine's KV has no codec {codec}: digests stay whole")
        return part.num_layers * part.num_tokens * part.num_heads * DIGEST_BYTES

    def export_kv(
        self, block_table: Seq[int], part: KvSlice, codec: KvCodec, payload: memoryview
    ) -> int:
        assert payload.nbytes == self.kv_payload_bytes(part, codec)
        blocks, slots = self._slots(block_table, part.token_start, part.num_tokens)
        digests = self._memory[part.layer_start : part.layer_end, blocks, slots]
        np.frombuffer(payload, dtype=np.uint64)[:] = digests.reshape(-1)
        return crc32c(payload)

    def import_kv(
        self,
        block_table: Seq[int],
        part: KvSlice,
        codec: KvCodec,
        payload: memoryview,
        checksum: int,
    ) -> None:
        expected = self.kv_payload_bytes(part, codec)
        if payload.nbytes != expected:
            raise KvTransferError(f"KV payload of {payload.nbytes} bytes where {expected} belong")
        is_whole = crc32c(payload) == checksum
        blocks, slots = self._slots(block_table, part.token_start, part.num_tokens)
        digests = np.frombuffer(payload, dtype=np.uint64).reshape(part.num_layers, part.num_tokens)
        memory = self._memory[part.layer_start : part.layer_end]
        memory[:, blocks, slots] = digests if is_whole else 0
        if not is_whole:
            raise KvTransferError("a KV payload is corrupt: its checksum differs")

    def _slots(
        self, block_table: Seq[int], start: int, num_tokens: int
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        positions = np.arange(start, start + num_tokens, dtype=np.intp)
        table = np.asarray(block_table, dtype=np.intp)
        return table[positions // self._block_size], positions % self._block_size

    def _write(self, item: ScheduledSequence) -> None:
        end = item.start + item.num_tokens
        tokens = np.asarray(item.tokens[item.start : end], dtype=np.uint64)
        positions = np.arange(item.start, end, dtype=np.uint64)
        digests = _mix(tokens + _mix(positions))[None, :] ^ self._salts[:, None]
        blocks, slots = self._slots(item.block_table, item.start, item.num_tokens)
        self._memory[:, blocks, slots] = digests

    def _sample(self, item: ScheduledSequence) -> tuple[SampledToken, ...]:
        end = item.start + item.num_tokens
        blocks, slots = self._slots(item.block_table, 0, end)
        context = int(np.bitwise_xor.reduce(_mix(self._memory[:, blocks, slots]), axis=None))
        return tuple(self._draw(context, item, choice) for choice in item.choices)

    def _draw(self, context: int, item: ScheduledSequence, choice: int) -> SampledToken:
        """A pure function of context, parameters and choice; greedy ignores seed and choice."""
        state = context
        if not item.params.greedy:
            state = _mix_int(state ^ (item.params.seed & _MASK)) + choice
        end_draw, letter_draw = _mix_int(state), _mix_int(state + 1)
        if end_draw < self._end_below and self._eos in item.params.stop_token_ids:
            token_id = self._eos
        else:
            token_id = _ALPHABET[letter_draw % len(_ALPHABET)]
        if item.params.top_logprobs is None:
            return SampledToken(token_id)
        logprob = -math.log(len(_ALPHABET))
        letters = sorted(set(_ALPHABET))[: item.params.top_logprobs]
        return SampledToken(token_id, logprob, tuple((letter, logprob) for letter in letters))


def _contains(tokens: Seq[int], wanted: list[int]) -> bool:
    size = len(wanted)
    return any(list(tokens[i : i + size]) == wanted for i in range(len(tokens) - size + 1))


@cache
def _tokenizer() -> tuple[TokenizerSpec, Tokenizer]:
    """The same for every sim engine of a process."""
    spec = sim_tokenizer_spec()
    return spec, Tokenizer(spec)


def _mix(values: Digests) -> Digests:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014), elementwise. Overflow wraps,
    without a warning as long as `values` has a dimension."""
    z = values + _MIX_ADD
    z = (z ^ (z >> _SHIFT_30)) * _MIX_FIRST
    z = (z ^ (z >> _SHIFT_27)) * _MIX_SECOND
    mixed: Digests = z ^ (z >> _SHIFT_31)
    return mixed


def _mix_int(value: int) -> int:
    z = (value + int(_MIX_ADD)) & _MASK
    z = ((z ^ (z >> 30)) * int(_MIX_FIRST)) & _MASK
    z = ((z ^ (z >> 27)) * int(_MIX_SECOND)) & _MASK
    return z ^ (z >> 31)
