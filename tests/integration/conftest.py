import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    return Path(os.environ["FOREBAY_TEST_GGUF"])
