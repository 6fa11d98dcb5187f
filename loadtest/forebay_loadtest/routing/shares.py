"""Cached-token shares of what clients saw, and how long one of them stayed low; pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STEP_S = 0.25
NEAR_POINTS = 2.0
"""A share this near to what it was before a fault is back."""


@dataclass(slots=True)
class Outcome:
    """One request as its client saw it. Times on `time.monotonic`; `error` is empty for one that
    was answered. `ideal_tokens`: what a cache without end would have had."""

    number: int
    gateway: int
    began: float
    ideal_tokens: int
    ended: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Share:
    """In percent of prompt tokens."""

    num_requests: int
    cached: float
    ideal: float

    @property
    def lost(self) -> float:
        """Points that a cache without end would have had more. It varies far less than the share
        itself, which goes up and down with what clients happen to ask."""
        return self.ideal - self.cached

    @classmethod
    def of(cls, outcomes: Iterable[Outcome]) -> Share:
        answered = [each for each in outcomes if not each.error]
        prompt = sum(each.prompt_tokens for each in answered) or 1
        cached = sum(each.cached_tokens for each in answered)
        ideal = sum(each.ideal_tokens for each in answered)
        return cls(len(answered), 100.0 * cached / prompt, 100.0 * ideal / prompt)


def ended_within(outcomes: Iterable[Outcome], begin: float, end: float) -> list[Outcome]:
    return [each for each in outcomes if begin < each.ended <= end]


@dataclass(frozen=True, slots=True)
class Recovery:
    """`dip`: the most points that a window lost beyond `before`. `back_s`: from the strike to the
    end of the last window that was not near; 0 when all were, None when the last one was not."""

    before: Share
    after: Share
    dip: float
    back_s: float | None


def recovery(
    outcomes: Sequence[Outcome], struck_at: float, until: float, before_s: float, window_s: float
) -> Recovery:
    """Windows of `window_s` end every quarter of a second from the strike to `until`; those in
    which nothing ended say nothing."""
    before = Share.of(ended_within(outcomes, struck_at - before_s, struck_at))
    dip, last_low, last = 0.0, None, 0.0
    for step in range(1, int((until - struck_at) / STEP_S) + 1):
        end = struck_at + step * STEP_S
        share = Share.of(ended_within(outcomes, max(struck_at, end - window_s), end))
        if not share.num_requests:
            continue
        last = end
        dip = max(dip, share.lost - before.lost)
        if share.lost > before.lost + NEAR_POINTS:
            last_low = end
    after = Share.of(ended_within(outcomes, until - window_s, until))
    if last_low is None:
        back_s: float | None = 0.0 if last else None
    else:
        back_s = last_low - struck_at if last_low < last else None
    return Recovery(before, after, dip, back_s)
