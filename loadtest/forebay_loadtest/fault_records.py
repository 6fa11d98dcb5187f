"""What one injected fault was, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass

from forebay_loadtest.fault_plan import FaultKind


@dataclass(slots=True)
class FaultRecord:
    """`at`: when it struck, on `time.monotonic`. `evidence`: how we know that it happened; empty
    while we do not. `back_s`: seconds until capacity was back, None while it is not."""

    kind: FaultKind
    at: float
    victim: str = ""
    evidence: str = ""
    back_s: float | None = None

    @property
    def verified(self) -> bool:
        return bool(self.evidence)
