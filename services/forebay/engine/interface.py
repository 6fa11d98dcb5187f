"""What the scheduler hands to a model runner, and what comes back. No torch here.

The engine (scheduler, block pool, sequences) is one for all models; only the runner differs:
`TorchRunner` computes, `SimRunner` pretends and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from forebay.core.kv_codec import KvCodec
from forebay.core.sampling import SamplingParams
from forebay.rpc.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """One sequence's share of a step.

    tokens: prompt and generated tokens so far (the runner only reads them).
    num_prompt_tokens: how many of `tokens` are the prompt; the rest count for penalties.
    start, num_tokens: tokens[start : start + num_tokens] are computed in this step; the KV of
        tokens[:start] already lies in the blocks of `block_table`.
    block_table: block ids; token i lies in block_table[i // block_size] at slot i % block_size.
    choices: choices to sample a next token for, all from the last position's logits. Empty when
        this chunk does not reach the end of `tokens`.
    """

    tokens: Seq[int]
    num_prompt_tokens: int
    start: int
    num_tokens: int
    block_table: Seq[int]
    params: SamplingParams
    choices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """One engine step. `block_copies` are (source, destination) block ids, copied in every layer
    before anything is computed (a fork's first write to a shared block)."""

    sequences: tuple[ScheduledSequence, ...]
    block_copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.sequences)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """`logprob` and `top` (token id, logprob; best first) are of the model's own distribution,
    before temperature and truncation; both are empty unless the parameters ask for logprobs."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """`tokens[i]` holds one sampled token per entry of batch.sequences[i].choices, same order.
    `modelled_s`: time that a simulated step would have taken; the caller waits for it."""

    tokens: tuple[tuple[SampledToken, ...], ...]
    modelled_s: float = 0.0


@dataclass(frozen=True, slots=True)
class KvSlice:
    """Part of a sequence's KV: some layers' keys and values of some heads, for some tokens."""

    layer_start: int
    num_layers: int
    token_start: int
    num_tokens: int
    head_start: int
    num_heads: int

    @property
    def layer_end(self) -> int:
        return self.layer_start + self.num_layers

    @property
    def token_end(self) -> int:
        return self.token_start + self.num_tokens

    @property
    def head_end(self) -> int:
        return self.head_start + self.num_heads


LayerHook = Callable[[int], None]
"""Called on the runner's own thread after a layer's KV of the batch has been written, with the
layer's index: 0, 1, 2, ... Until it returns the step waits. It may call `export_kv`, and must not
raise."""


class Runner(Protocol):
    """A model and its KV memory. One thread at a time calls it; it calls back only a LayerHook.

    KV payloads are as worker.proto says at `KvCodec`: tokens one after another, whatever the size
    of the blocks that they come from or go to.
    """

    @property
    def model(self) -> worker_pb2.ModelInfo: ...

    @property
    def kv_layout(self) -> worker_pb2.KvLayout: ...

    @property
    def kv_codecs(self) -> tuple[KvCodec, ...]:
        """What `export_kv` can write and `import_kv` can read; raw is always among them."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def tokenizer_spec(self) -> bytes:
        """`forebay.text.spec.TokenizerSpec` as bytes."""

    def run(self, batch: Batch, on_layer: LayerHook | None = None) -> StepResult:
        """Computes one step: writes the KV of every scheduled token, samples where asked. A batch
        without sequences computes no layer."""

    def kv_payload_bytes(self, part: KvSlice, codec: KvCodec) -> int:
        """Of the payload that stands for `part`: so many for each token of a layer's head. Raises
        KvTransferError for a codec that is none of `kv_codecs`."""

    def export_kv(
        self, block_table: Seq[int], part: KvSlice, codec: KvCodec, payload: memoryview
    ) -> int:
        """Fills `payload`, of `kv_payload_bytes`; returns its CRC-32C."""

    def import_kv(
        self,
        block_table: Seq[int],
        part: KvSlice,
        codec: KvCodec,
        payload: memoryview,
        checksum: int,
    ) -> None:
        """Writes what `export_kv` gave. Raises KvTransferError for a codec that is none of
        `kv_codecs` or a wrong number of bytes, and then writes nothing; and for a payload whose
        CRC-32C is not `checksum`, after which the part holds zeros: KV memory never holds numbers
        that nobody computed, which could be no numbers at all."""
