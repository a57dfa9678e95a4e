"""How long a call to AWS takes at most, whatever comes back."""

from __future__ import annotations

import concurrent.futures
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

_Result = TypeVar("_Result")

# While so many calls that were given up still hang, nothing more is asked.
_MOST_HANGING = 16
_until = threading.local()


def check_time(**_: Any) -> None:
    """Of botocore's event before-send: sends nothing once the call was given up, or a key would be made that
    nobody waits for."""
    if time.monotonic() > getattr(_until, "moment", float("inf")):
        raise TimeoutError("the call was given up")


class InTime:
    """Calls of one service, each ended after a time.

    botocore bounds how long each piece of an answer is waited for, and not how many there are. Nothing ends a
    read from outside, so it goes on in a thread of its own until its answer ends or the process does.
    """

    def __init__(self) -> None:
        self.hanging: set[concurrent.futures.Future[Any]] = set()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.hanging.clear)  # it has none of their threads

    def __call__(self, call: Callable[[], _Result], deadline: float) -> _Result:
        """What it returns or raises; TimeoutError where it does neither in ``deadline`` seconds."""
        if len(self.hanging) >= _MOST_HANGING:
            raise TimeoutError(f"{_MOST_HANGING} earlier calls have no answer yet")
        done: concurrent.futures.Future[_Result] = concurrent.futures.Future()

        def run() -> None:
            _until.moment = time.monotonic() + deadline
            try:
                done.set_result(call())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, name="kakunin aws", daemon=True).start()
        try:
            return done.result(deadline)
        except concurrent.futures.TimeoutError as error:  # TimeoutError itself from Python 3.11 on
            if not done.done():
                self.hanging.add(done)
                done.add_done_callback(self.hanging.discard)
            raise TimeoutError(f"no whole answer within {deadline:g} s") from error
