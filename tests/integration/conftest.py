"""The reference that several tests compare with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint


@pytest.fixture(scope="session")
def reference_model(default_model_path: Path) -> LlamaForCausalLM:
    """What transformers' `from_pretrained(gguf_file=...)` builds, in fp32, without its need for
    accelerate."""
    fields = load_gguf_checkpoint(default_model_path)["config"]
    model = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation="eager"))
    tensors = load_gguf_checkpoint(
        default_model_path, return_tensors=True, model_to_load=model, torch_dtype=torch.float32
    )["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model.eval()
