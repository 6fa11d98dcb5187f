"""The Llama family: pre-norm blocks of grouped-query attention and a gated MLP."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from forebay.engine.config import ModelConfig
from forebay.engine.inputs import StepInputs
from forebay.engine.interface import LayerHook
from forebay.engine.models.rope import inverse_frequencies
from forebay.engine.weights.source import TensorSource, check_tensors
from forebay_kernels import ops

KvCaches = Seq[tuple[Tensor, Tensor]]
"""Per layer the key and the value cache, both [num_blocks, block_size, num_kv_heads, head_dim]."""


@dataclass(frozen=True, slots=True)
class Projection:
    """weight: [outputs, inputs]."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class LlamaLayer:
    """qkv: the rows of q, k and v one after another; gate_up: of gate, then up."""

    attention_norm: Tensor
    qkv: Projection
    output: Projection
    mlp_norm: Tensor
    gate_up: Projection
    down: Projection


class LlamaModel:
    """Inference only, over flat tokens and a paged KV cache that the caller owns."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        layers: Seq[LlamaLayer],
        norm: Tensor,
        lm_head: Tensor,
    ) -> None:
        self.config = config
        self.dtype = embedding.dtype
        self.device = embedding.device
        self._embedding = embedding
        self._layers = tuple(layers)
        self._norm = norm
        self._lm_head = lm_head
        self._inverse_frequencies = inverse_frequencies(config).to(self.device)

    def forward(
        self, inputs: StepInputs, kv_caches: KvCaches, on_layer: LayerHook | None = None
    ) -> Tensor:
        """Writes the KV of every token; returns the final hidden states [R, hidden_size] of
        inputs.sample_rows."""
        eps = self.config.rms_eps
        angles = inputs.positions[:, None].float() * self._inverse_frequencies
        rotation = angles.cos(), angles.sin()
        update = F.embedding(inputs.token_ids, self._embedding)
        residual = torch.zeros_like(update)
        for index, (layer, caches) in enumerate(zip(self._layers, kv_caches, strict=True)):
            hidden, residual = ops.add_rms_norm(update, residual, layer.attention_norm, eps)
            update = self._attention(layer, hidden, rotation, caches, inputs)
            if on_layer is not None:
                on_layer(index)
            hidden, residual = ops.add_rms_norm(update, residual, layer.mlp_norm, eps)
            update = layer.down(ops.silu_and_mul(layer.gate_up(hidden)))
        rows = inputs.sample_rows
        hidden, _ = ops.add_rms_norm(update[rows], residual[rows], self._norm, eps)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden_size] -> fp32 [R, vocab_size]."""
        return F.linear(hidden, self._lm_head).float()

    def _attention(
        self,
        layer: LlamaLayer,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        caches: tuple[Tensor, Tensor],
        inputs: StepInputs,
    ) -> Tensor:
        heads = layer.qkv(hidden).view(len(hidden), -1, self.config.head_dim)
        queries = ops.qkv_post(heads, *rotation, *caches, inputs.slot_mapping)
        outputs: list[Tensor] = []
        at = 0
        for decode in inputs.decode_plans:
            end = at + len(decode.context_lens)
            outputs.append(ops.paged_decode(queries[at:end], *caches, decode))
            at = end
        for prefill in inputs.prefill_plans:
            end = at + prefill.num_tokens
            outputs.append(ops.paged_prefill(queries[at:end], *caches, prefill))
            at = end
        attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return layer.output(attended.flatten(1))


def load_llama(
    config: ModelConfig, source: TensorSource, dtype: torch.dtype, device: torch.device
) -> LlamaModel:
    """Reads tensor by tensor, straight into the fused weights. Raises ModelFileError."""
    expected = expected_tensors(config)
    check_tensors(source, expected)

    def read(*names: str) -> Tensor:
        sizes = [expected[name][0] for name in names]
        shape = (sum(sizes), *expected[names[0]][1:])
        fused = torch.empty(shape, dtype=dtype, device=device)
        for part, name in zip(torch.split(fused, sizes), names, strict=True):
            part.copy_(source.read(name))
        return fused

    def projection(*names: str) -> Projection:
        biases = [f"{name}.bias" for name in names]
        return Projection(
            weight=read(*(f"{name}.weight" for name in names)),
            bias=read(*biases) if biases[0] in expected else None,
        )

    def layer(prefix: str) -> LlamaLayer:
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return LlamaLayer(
            attention_norm=read(f"{prefix}.input_layernorm.weight"),
            qkv=projection(*(f"{attention}.{part}_proj" for part in "qkv")),
            output=projection(f"{attention}.o_proj"),
            mlp_norm=read(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=projection(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            down=projection(f"{mlp}.down_proj"),
        )

    embedding = read("model.embed_tokens.weight")
    return LlamaModel(
        config,
        embedding,
        [layer(f"model.layers.{i}") for i in range(config.num_layers)],
        norm=read("model.norm.weight"),
        lm_head=embedding if config.tie_embeddings else read("lm_head.weight"),
    )


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model with its shape."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    projections = (
        ("self_attn.q_proj", q_rows, hidden, config.attention_bias),
        ("self_attn.k_proj", kv_rows, hidden, config.attention_bias),
        ("self_attn.v_proj", kv_rows, hidden, config.attention_bias),
        ("self_attn.o_proj", hidden, q_rows, config.attention_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    )
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, outputs, inputs, bias in projections:
            shapes[f"{prefix}.{name}.weight"] = (outputs, inputs)
            if bias:
                shapes[f"{prefix}.{name}.bias"] = (outputs,)
    return shapes
