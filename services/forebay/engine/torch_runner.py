"""The runner that computes: a model and its paged KV memory on one torch device."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path

import torch

from forebay.core.errors import ConfigurationError, ModelFileError
from forebay.core.kv_codec import KvCodec
from forebay.engine.inputs import build_inputs
from forebay.engine.interface import Batch, KvSlice, LayerHook, SampledToken, StepResult
from forebay.engine.kv_memory import KvMemory
from forebay.engine.models.llama import LlamaModel, load_llama
from forebay.engine.sampler import sample
from forebay.engine.weights.checkpoint import open_checkpoint
from forebay.rpc.v1 import worker_pb2
from forebay.text.spec import TokenizerSpec
from forebay.text.tokenizer import Tokenizer

LAYOUT_VERSION = 1

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_KV_DTYPES = {
    torch.float32: worker_pb2.KV_DTYPE_FP32,
    torch.bfloat16: worker_pb2.KV_DTYPE_BF16,
    torch.float16: worker_pb2.KV_DTYPE_FP16,
}


class TorchRunner:
    """Implements `Runner`. eos_token_ids: the model's and the tokenizer's end tokens."""

    def __init__(
        self,
        model: LlamaModel,
        *,
        model_id: str,
        revision: str,
        tokenizer: TokenizerSpec,
        eos_token_ids: Seq[int],
        num_blocks: int,
        block_size: int,
        max_model_len: int,
    ) -> None:
        config = model.config
        self._network = model
        self._tokenizer_spec = tokenizer.to_bytes()
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._kv = KvMemory(
            num_layers=config.num_layers,
            num_blocks=num_blocks,
            block_size=block_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=model.dtype,
            device=model.device,
        )
        self._model = worker_pb2.ModelInfo(
            id=model_id,
            revision=revision,
            tokenizer_hash=tokenizer.hash,
            vocab_size=config.vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=eos_token_ids,
            engine="torch",
        )
        self._layout = worker_pb2.KvLayout(
            version=LAYOUT_VERSION,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=_KV_DTYPES[model.dtype],
            block_size=block_size,
            bytes_per_token_layer=(
                2 * config.num_kv_heads * config.head_dim * model.dtype.itemsize
            ),
        )

    @property
    def model(self) -> worker_pb2.ModelInfo:
        return self._model

    @property
    def kv_layout(self) -> worker_pb2.KvLayout:
        return self._layout

    @property
    def kv_codecs(self) -> tuple[KvCodec, ...]:
        return (KvCodec.RAW, KvCodec.FP8)

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def tokenizer_spec(self) -> bytes:
        return self._tokenizer_spec

    def run(self, batch: Batch, on_layer: LayerHook | None = None) -> StepResult:
        """Raises InternalError when the logits of a sequence are not finite."""
        with torch.inference_mode():
            if batch.block_copies:
                self._kv.copy_blocks(batch.block_copies)
            if not batch.sequences:
                return StepResult(())
            inputs = build_inputs(
                batch, self._block_size, self._network.dtype, self._network.device
            )
            hidden = self._network.forward(inputs, self._kv.layers, on_layer)
            tokens: list[tuple[SampledToken, ...]] = [()] * len(batch.sequences)
            if inputs.sampled:
                sampled = sample(
                    self._network.logits(hidden), [batch.sequences[i] for i in inputs.sampled]
                )
                for i, drawn in zip(inputs.sampled, sampled, strict=True):
                    tokens[i] = drawn
            return StepResult(tuple(tokens))

    def kv_payload_bytes(self, part: KvSlice, codec: KvCodec) -> int:
        return self._kv.payload_bytes(part, codec)

    def export_kv(
        self, block_table: Seq[int], part: KvSlice, codec: KvCodec, payload: memoryview
    ) -> int:
        with torch.inference_mode():
            return self._kv.pack(block_table, part, codec, payload)

    def import_kv(
        self,
        block_table: Seq[int],
        part: KvSlice,
        codec: KvCodec,
        payload: memoryview,
        checksum: int,
    ) -> None:
        with torch.inference_mode():
            self._kv.unpack(block_table, part, codec, payload, checksum)


def load_torch_runner(
    path: Path,
    *,
    model_id: str,
    dtype: str,
    num_blocks: int | None,
    kv_memory_bytes: int,
    block_size: int,
    max_model_len: int | None,
    device: str = "cpu",
    num_threads: int | None = None,
) -> TorchRunner:
    """dtype: auto, fp32, bf16 or fp16. num_blocks None takes as many as kv_memory_bytes holds.

    num_threads is torch's own, process-wide. Raises ConfigurationError, ModelFileError.
    """
    torch_device = _device(device)
    torch_dtype = _dtype(dtype, torch_device)
    if block_size < 1:
        raise ConfigurationError(f"block_size: {block_size} is not positive")
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    block_bytes = config.kv_values_per_token * torch_dtype.itemsize * block_size
    num_blocks = kv_memory_bytes // block_bytes if num_blocks is None else num_blocks
    if num_blocks < 1:
        raise ConfigurationError(
            f"no room for KV: num_blocks is {num_blocks}, one block takes {block_bytes} bytes"
        )
    longest = min(config.max_position, num_blocks * block_size)
    if max_model_len is not None:
        longest = min(longest, max_model_len)
    tokenizer = Tokenizer(checkpoint.tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelFileError(
            f"{path}: the model has no room for the tokenizer: {config.vocab_size} tokens, "
            f"not {tokenizer.vocab_size}"
        )
    return TorchRunner(
        load_llama(config, checkpoint.source, torch_dtype, torch_device),
        model_id=model_id,
        revision=checkpoint.revision,
        tokenizer=checkpoint.tokenizer,
        eos_token_ids=list(dict.fromkeys(config.eos_token_ids + tokenizer.eos_ids)),
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=longest,
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"device: {name!r} is none that torch knows") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"device: {name!r}, but torch sees no CUDA device")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """auto is bf16 on CUDA and on processors that multiply it natively, else fp32."""
    if name == "auto":
        capabilities = torch.cpu.get_capabilities()
        native = device.type == "cuda" or any(
            capabilities.get(flag, False) for flag in ("avx512_bf16", "amx_bf16")
        )
        return torch.bfloat16 if native else torch.float32
    if name not in _DTYPES:
        raise ConfigurationError(f"dtype: {name!r} is none of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]
