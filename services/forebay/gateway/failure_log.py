"""How a bug is logged where requests pass: without a word of any request."""

from __future__ import annotations

import logging
import traceback

logger = logging.getLogger(__name__)


def log_failure(request_id: str, error: BaseException) -> None:
    """Type and place only: a message may quote the request."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    place = " < ".join(f"{f.filename}:{f.lineno} {f.name}" for f in reversed(frames))
    logger.error("request=%s failed: %s at %s", request_id, type(error).__name__, place)
