"""How often somebody may ask, and how much at once, in this process."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Hashable
from weakref import WeakValueDictionary

_MOST = 10_000


class RateLimit:
    """A token bucket each: ``per_minute`` requests, all at once if they like.

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


class AtOnce:
    """``most`` at once of each. Forgets whoever has none."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._turns: WeakValueDictionary[Hashable, asyncio.Semaphore] = WeakValueDictionary()

    def of(self, who: Hashable) -> asyncio.Semaphore:
        """What to hold meanwhile."""
        turns = self._turns.get(who)
        if turns is None:
            turns = self._turns[who] = asyncio.Semaphore(self._most)
        return turns
