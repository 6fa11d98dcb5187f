"""Sums over sets of slots that are given as bits of integers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def added_up(
    masks: Sequence[int], amounts: Sequence[float], num_slots: int
) -> npt.NDArray[np.float32]:
    """By slot: the sum of the amounts whose mask has the slot's bit."""
    if not masks or not num_slots:
        return np.zeros(num_slots, dtype=np.float32)
    width = (num_slots + 7) // 8
    packed = np.frombuffer(b"".join([m.to_bytes(width, "little") for m in masks]), dtype=np.uint8)
    bits = np.unpackbits(packed.reshape(-1, width), axis=1, count=num_slots, bitorder="little")
    if len(masks) == 1:  # no need to wake the threads of the linear algebra
        alone: npt.NDArray[np.float32] = bits[0] * np.float32(amounts[0])
        return alone
    return np.asarray(amounts, dtype=np.float32) @ bits.astype(np.float32)
