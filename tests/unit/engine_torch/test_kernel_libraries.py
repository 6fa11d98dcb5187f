from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import save_tiny_llama, save_tokenizer

from forebay.core.settings import EngineSettings
from forebay.engine.loader import load_runner
from forebay_kernels import native


class _Recorded(native.Libraries):
    def __init__(self) -> None:
        super().__init__()
        self.wanted: list[tuple[str, Path | None]] = []

    def _choose(self, device_type: str) -> None:
        self.wanted.append((device_type, self._cache_dir))


def test_a_worker_has_its_library_before_its_first_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = _Recorded()
    monkeypatch.setattr(native, "libraries", recorded)
    monkeypatch.setenv("FOREBAY_CACHE_DIR", str(tmp_path / "cache"))
    save_tiny_llama(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    load_runner(EngineSettings(model_path=str(tmp_path / "model"), dtype="fp32", num_blocks=4))
    assert recorded.wanted == [("cpu", tmp_path / "cache" / "kernels")]
