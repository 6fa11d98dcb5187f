"""Drawing the next token: temperature, min-p, top-k, top-p and grammar in one operation."""

from __future__ import annotations

import torch
from torch import Tensor

from forebay_kernels import native, reference
from forebay_kernels.checks import check_tensor, require
from forebay_kernels.params import constants
from forebay_kernels.registry import register

_LIMITS = constants("ForebaySample")
MAX_VOCAB = _LIMITS["FOREBAY_SAMPLE_VOCAB"]
_MAX_DRAWS = _LIMITS["FOREBAY_SAMPLE_DRAWS"]
_WORKSPACE_BYTES = _LIMITS["FOREBAY_SAMPLE_WORKSPACE"]
_DTYPES = (torch.float32, torch.bfloat16)


def _check(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    choice: Tensor,
    position: Tensor,
    bitmask: Tensor | None,
) -> None:
    op, device = "sample", logits.device
    check_tensor(op, "logits", logits, dtypes=_DTYPES, shape=(None, None), device=device)
    num_rows, vocab = logits.shape
    size = f"{vocab} ids to a row where 1 to {MAX_VOCAB} belong"
    require(1 <= vocab <= MAX_VOCAB, op, "logits", size)
    require(logits.stride(1) == 1 or vocab == 1, op, "logits", "rows have gaps")
    draws = rows.shape[0] if rows.ndim == 1 else None
    named = (
        ("rows", rows, torch.int32),
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
        ("seed", seed, torch.int64),
        ("choice", choice, torch.int32),
        ("position", position, torch.int32),
    )
    for name, tensor, dtype in named:
        check_tensor(op, name, tensor, dtypes=(dtype,), shape=(draws,), device=device)
        require(tensor.is_contiguous(), op, name, "has gaps")
    if bitmask is not None:
        shape = (num_rows, -(-vocab // 32))
        check_tensor(op, "bitmask", bitmask, dtypes=(torch.int32,), shape=shape, device=device)
        require(bitmask.is_contiguous(), op, "bitmask", "has gaps")
    if device.type == "cpu" and rows.numel() > 0:
        low, high = (int(bound) for bound in rows.aminmax())
        inside = low >= -1 and high < num_rows
        require(inside, op, "rows", f"{low} to {high} where -1 to {num_rows - 1} belong")


def _sample(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    choice: Tensor,
    position: Tensor,
    bitmask: Tensor | None,
    logprobs: bool,
) -> tuple[Tensor, Tensor]:
    settings = (rows, temperature, top_k, top_p, min_p, seed, choice, position)
    _check(logits, *settings, bitmask)
    token, logprob = _outputs(logits, rows, logprobs)
    draws = rows.shape[0]
    workspace = torch.empty(
        min(draws, _MAX_DRAWS) * _WORKSPACE_BYTES, dtype=torch.uint8, device=logits.device
    )
    computed = native.call(
        "sample",
        logits.device,
        logits=logits.data_ptr(),
        rows=rows.data_ptr(),
        temperature=temperature.data_ptr(),
        top_k=top_k.data_ptr(),
        top_p=top_p.data_ptr(),
        min_p=min_p.data_ptr(),
        seed=seed.data_ptr(),
        choice=choice.data_ptr(),
        position=position.data_ptr(),
        bitmask=None if bitmask is None else bitmask.data_ptr(),
        token=token.data_ptr(),
        logprob=logprob.data_ptr() if logprobs else None,
        workspace=workspace.data_ptr(),
        draws=draws,
        num_rows=logits.shape[0],
        vocab=logits.shape[1],
        row_stride=logits.stride(0),
        dtype=native.DTYPE_CODES[logits.dtype],
        num_threads=torch.get_num_threads(),
    )
    if not computed:
        return reference.sample(logits, *settings, bitmask, logprobs)
    return token, logprob


def _outputs(logits: Tensor, rows: Tensor, logprobs: bool) -> tuple[Tensor, Tensor]:
    draws = rows.shape[0]
    return (
        torch.empty(draws, dtype=torch.int32, device=logits.device),
        torch.empty(draws if logprobs else 0, dtype=torch.float32, device=logits.device),
    )


def _sample_meta(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    choice: Tensor,
    position: Tensor,
    bitmask: Tensor | None,
    logprobs: bool,
) -> tuple[Tensor, Tensor]:
    settings = (rows, temperature, top_k, top_p, min_p, seed, choice, position)
    _check(logits, *settings, bitmask)
    return _outputs(logits, rows, logprobs)


_SAMPLE = register(
    "sample(Tensor logits, Tensor rows, Tensor temperature, Tensor top_k, Tensor top_p,"
    " Tensor min_p, Tensor seed, Tensor choice, Tensor position, Tensor? bitmask, bool logprobs)"
    " -> (Tensor, Tensor)",
    _sample,
    _sample_meta,
)


def sample(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    choice: Tensor,
    position: Tensor,
    bitmask: Tensor | None = None,
    *,
    logprobs: bool = True,
) -> tuple[Tensor, Tensor]:
    """R draws from N rows of V <= 2^20 logits; the same tokens on every device, whatever the batch.

    logits: fp32 or bf16 [N, V]. rows: int32 [R], the row of each draw; -1: none, its token is -1.
    temperature: fp32 [R]; below 2^-64 the most probable id is taken and nothing drawn. Otherwise
    what is left by min_p (fp32 [R]: ids at least that probable compared with the most probable),
    then by top_k (int32 [R]: so many; < 1 is all), then by top_p (fp32 [R]: the fewest ids that
    hold at least that share of the mass that is left; >= 1 is all). The most probable id always
    stays; among equal logits lower ids stay, and are taken. The draw is the inverse of the
    cumulative distribution, ids ascending, at the 64 random bits of (seed int64 [R], choice int32
    [R], position int32 [R]).
    bitmask: int32 [N, ceil(V / 32)]; an id whose bit (i % 32 of word i // 32) is 0 does not exist,
    nor does one with a logit of -inf.

    Returns (token int32 [R], logprob fp32 [R], or [0] unless `logprobs`). logprob is the
    log-softmax of the whole row as it was given, to about 3e-7 before it is rounded. Token -1,
    logprob NaN: no id is possible, or the row has a NaN or +inf. Raises ArgumentError.
    """
    out: tuple[Tensor, Tensor] = _SAMPLE(
        logits, rows, temperature, top_k, top_p, min_p, seed, choice, position, bitmask, logprobs
    )
    return out
