"""How often somebody may ask: a token bucket each, in this process."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Hashable

_MOST = 10_000


class RateLimit:
    """``per_minute`` requests of each, all at once if they like.

    :param most: how many are remembered. Beyond, whoever asked longest ago is forgotten: their bucket has
        had the most time to fill.
    """

    def __init__(self, per_minute: int, most: int = _MOST) -> None:
        self.per_minute = per_minute
        self._most = most
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def wait(self, who: Hashable, *, take: bool = True) -> int:
        """Seconds until ``who`` may ask, rounded up; 0 is now, and ``take`` counts it as asked."""
        now = time.monotonic()
        tokens, at = self._buckets.pop(who, (float(self.per_minute), now))
        tokens = min(self.per_minute, tokens + (now - at) * self.per_minute / 60)
        wait = 0 if tokens >= 1 else max(1, math.ceil((1 - tokens) * 60 / self.per_minute))
        if take and not wait:
            tokens -= 1
        self._buckets[who] = tokens, now
        while len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        return wait
