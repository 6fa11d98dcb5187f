"""Asks a gateway, over HTTP, what became of a request."""

from __future__ import annotations

import json
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import ProxyHandler, build_opener

from forebay.core.errors import InternalError, NotFound, Unavailable

EXPLAIN_TIMEOUT_S = 10.0


def fetch_explanation(
    url: str, request_id: str, timeout_s: float = EXPLAIN_TIMEOUT_S
) -> dict[str, Any]:
    """The record as docs/explain.md describes it. `url`: the gateway's base, http://host:port.
    Raises NotFound for a request that this gateway does not know, Unavailable, InternalError."""
    place = f"{url.rstrip('/')}/v1/requests/{quote(request_id, safe='')}/explain"
    try:
        with build_opener(ProxyHandler({})).open(place, timeout=timeout_s) as response:
            answer = json.loads(response.read())
    except HTTPError as error:
        with error:
            raise _refused(error, url) from error
    except (OSError, ValueError) as error:
        raise Unavailable(f"no gateway answers on {url}: {error}") from error
    if not isinstance(answer, dict) or "phases" not in answer:
        raise InternalError(f"{url} gave no explanation")
    return answer


def _refused(error: HTTPError, url: str) -> NotFound | Unavailable:
    try:
        fields = json.loads(error.read())["error"]
        if fields["code"] == "request_not_found":
            return NotFound(fields["message"], param="request_id", code=fields["code"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return Unavailable(f"{url} answered {error.code}; is it a gateway of this version?")
