"""The runner that computes: a model and its paged KV memory on one torch device."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from forebay.core.errors import ConfigurationError, KvTransferError, ModelFileError
from forebay.engine.inputs import build_inputs, slot_range
from forebay.engine.interface import Batch, LayerHook, SampledToken, StepResult
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
        self._kv = _zeroed_kv(
            (config.num_layers, 2, num_blocks, block_size, config.num_kv_heads, config.head_dim),
            model.dtype,
            model.device,
        )
        self._layer_caches = [(layer[0], layer[1]) for layer in self._kv]
        self._kv_slots = self._kv.flatten(2, 3)
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
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def tokenizer_spec(self) -> bytes:
        return self._tokenizer_spec

    def run(self, batch: Batch, on_layer: LayerHook | None = None) -> StepResult:
        """Raises InternalError when the logits of a sequence are not finite."""
        with torch.inference_mode():
            if batch.block_copies:
                self._copy_blocks(batch.block_copies)
            if not batch.sequences:
                return StepResult(())
            inputs = build_inputs(
                batch, self._block_size, self._network.dtype, self._network.device
            )
            hidden = self._network.forward(inputs, self._layer_caches, on_layer)
            tokens: list[tuple[SampledToken, ...]] = [()] * len(batch.sequences)
            if inputs.sampled:
                sampled = sample(
                    self._network.logits(hidden), [batch.sequences[i] for i in inputs.sampled]
                )
                for i, drawn in zip(inputs.sampled, sampled, strict=True):
                    tokens[i] = drawn
            return StepResult(tuple(tokens))

    def export_kv(
        self,
        block_table: Seq[int],
        token_start: int,
        num_tokens: int,
        layer_start: int,
        num_layers: int,
    ) -> bytes:
        with torch.inference_mode():
            layers = self._kv_slots.narrow(0, layer_start, num_layers)
            slots = self._slots(block_table, token_start, num_tokens)
            # As bytes because numpy knows no bfloat16.
            return layers.index_select(2, slots).view(torch.uint8).cpu().numpy().tobytes()

    def import_kv(
        self,
        block_table: Seq[int],
        token_start: int,
        num_tokens: int,
        layer_start: int,
        num_layers: int,
        payload: memoryview,
    ) -> None:
        expected = num_layers * num_tokens * self._layout.bytes_per_token_layer
        if payload.nbytes != expected:
            raise KvTransferError(f"KV payload of {payload.nbytes} bytes where {expected} belong")
        with torch.inference_mode():
            layers = self._kv_slots.narrow(0, layer_start, num_layers)
            slots = self._slots(block_table, token_start, num_tokens)
            shape = (*layers.shape[:2], num_tokens, *layers.shape[3:])
            staging = torch.empty(shape, dtype=layers.dtype)
            staging.view(torch.uint8).numpy().reshape(-1)[:] = np.frombuffer(payload, np.uint8)
            layers.index_copy_(2, slots, staging.to(layers.device))

    def _slots(self, block_table: Seq[int], token_start: int, num_tokens: int) -> Tensor:
        end = token_start + num_tokens
        slots = slot_range(block_table, token_start, end, self._block_size)
        return torch.tensor(slots, dtype=torch.int64).to(self._kv.device)

    def _copy_blocks(self, block_copies: Seq[tuple[int, int]]) -> None:
        sources, destinations = torch.tensor(block_copies, dtype=torch.int64).to(self._kv.device).T
        self._kv.index_copy_(2, destinations, self._kv.index_select(2, sources))


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


def _zeroed_kv(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, because a masked slot that was never written must not hold a NaN (0 * NaN is NaN).
    On the CPU through numpy, whose zeros take no memory before they are written; torch's do.
    Raises ConfigurationError when the device has not that much."""
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        if device.type == "cpu":
            return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
        return torch.zeros(shape, dtype=dtype, device=device)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ConfigurationError(
            f"{num_bytes} bytes for KV are more than the {device.type} device has left"
        ) from error


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
