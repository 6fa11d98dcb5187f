"""How long a step of a real deployment takes, for the sim engine."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from forebay.engine.interface import Batch


@dataclass(frozen=True, slots=True)
class StepProfile:
    """prefill_s: (prompt tokens, seconds) points, ascending, interpolated on log-log axes and
    continued linearly in tokens beyond both ends. A step that decodes costs decode_base_s
    + decode_per_sequence_s * sequences + decode_per_kv_token_s * tokens of context."""

    prefill_s: tuple[tuple[int, float], ...]
    decode_base_s: float
    decode_per_sequence_s: float
    decode_per_kv_token_s: float

    def prefill(self, num_tokens: int) -> float:
        points = self.prefill_s
        at = bisect_right(points, num_tokens, key=lambda point: point[0])
        if at in (0, len(points)):
            tokens, seconds = points[0] if at == 0 else points[-1]
            return seconds * num_tokens / tokens
        (x0, y0), (x1, y1) = points[at - 1], points[at]
        share = math.log(num_tokens / x0) / math.log(x1 / x0)
        return y0 * math.pow(y1 / y0, share)

    def step(self, batch: Batch) -> float:
        """Seconds of one step; a chunk costs what it adds to the prompt computed before it."""
        seconds = 0.0
        num_decodes = num_kv_tokens = 0
        for item in batch.sequences:
            end = item.start + item.num_tokens
            if item.num_tokens == 1 and item.start >= item.num_prompt_tokens:
                num_decodes += 1
                num_kv_tokens += end
            else:
                seconds += self.prefill(end) - (self.prefill(item.start) if item.start else 0.0)
        if num_decodes:
            seconds += self.decode_base_s
            seconds += self.decode_per_sequence_s * num_decodes
            seconds += self.decode_per_kv_token_s * num_kv_tokens
        return seconds


LLAMA2_70B_H100_TP8 = StepProfile(
    prefill_s=((512, 0.054), (2048, 0.134), (4096, 0.376), (8192, 0.831)),
    decode_base_s=29.89e-3,
    decode_per_sequence_s=0.199e-3,
    decode_per_kv_token_s=1.79e-7,
)
"""Llama-2-70B on eight H100, tensor parallel. Fitted to the measured times that the authors of
Splitwise (ISCA 2024) published with their simulator; median error 1.6 % for decode steps."""
