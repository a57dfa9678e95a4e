"""What the guards of all frameworks are made of: a call that is asked for first, and the event it leaves.

Of a call that ran, an event says the framework, the tool's name, whether it returned or raised, the class of
what it raised and how long it took. Of one that a scope refused, that it was attempted. Arguments, results
and the texts of errors are never in it.
"""

from __future__ import annotations

import threading
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final

from ..client import AsyncKakunin, Kakunin
from ..credential import AgentCredential
from ..errors import BadInputError, KakuninError, ScopeViolationError
from ..monitoring import Monitor
from ..scope import ScopeGuard, run_within

# The ledger's name for what a certificate's scopes refused (docs/binding.md).
ATTEMPT: Final = "unauthorized_access_attempt"

_monitors: weakref.WeakKeyDictionary[Kakunin | AsyncKakunin, Monitor] = weakref.WeakKeyDictionary()
_making = threading.RLock()  # a client may come to its end while another's monitor is made


def monitor_of(kakunin: Kakunin | AsyncKakunin) -> Monitor:
    """The monitor that all guards of this client share, and with it one connection. It ends with the client.

    Raises BadInputError for a client that acts for nobody."""
    with _making:
        monitor = _monitors.get(kakunin)
        if monitor is None:
            monitor = _monitors[kakunin] = Monitor(kakunin)
            # Its thread records what waits, and then ends.
            weakref.finalize(kakunin, monitor.close, 0).atexit = False
        return monitor


class Guarded:
    """Calls that happen only while an agent may make them.

    :param framework: its name, for the events.
    :param kakunin: as ``agent_id`` and ``required_scopes``, those of :class:`~kakunin_db.ScopeGuard`.
    :param event_type: of the event of a call that ran.
    :param monitor: takes the events; by default :func:`monitor_of` the client.
    :param monitored: False for no events.

    Raises BadInputError for what is none of these, and for a client that acts for nobody.
    """

    def __init__(
        self,
        framework: str,
        kakunin: Kakunin | AsyncKakunin,
        agent_id: uuid.UUID | str | None = None,
        required_scopes: Sequence[str] | None = None,
        *,
        event_type: str = "api_call",
        monitor: Monitor | None = None,
        monitored: bool = True,
    ) -> None:
        self.scope = ScopeGuard(kakunin, agent_id, required_scopes)
        _, acts_by = kakunin.acts_as()
        if monitor is not None and not isinstance(monitor, Monitor):
            raise BadInputError(f"events go to a Monitor, and not to {type(monitor).__name__}")
        self.framework = framework
        self.event_type = event_type
        self.monitor = (monitor or monitor_of(kakunin)) if monitored else None
        # A guard of another agent's is a mistake in the program, and no attempt of this one's.
        self._anothers = (
            self.scope.agent_id is not None
            and isinstance(acts_by, AgentCredential)
            and acts_by.agent_id != self.scope.agent_id
        )

    def check(self, **what: str) -> None:
        """Returns if the agent may. Raises what :meth:`ScopeGuard.check` does, made by :meth:`refusal`."""
        try:
            self.scope.check()
        except KakuninError as error:
            raise self._refused(error, what) from error.__cause__

    async def acheck(self, **what: str) -> None:
        """:meth:`check` for asyncio."""
        try:
            await self.scope.acheck()
        except KakuninError as error:
            raise self._refused(error, what) from error.__cause__

    def call(self, **what: str) -> Call:
        """A block that is entered if the agent may, by ``with`` or by ``async with``.

        :param what: is called, for the event: ``tool="search"``.

        Entering raises what :meth:`check` does."""
        return Call(self, what)

    def refusal(self, error: KakuninError) -> Exception:
        """What is raised for an error of the check: itself, or another that the framework handles."""
        return error

    def note(self, event_type: str, what: dict[str, Any]) -> None:
        """Has an event recorded, if there are to be any."""
        if self.monitor is not None:
            self.monitor.record(event_type, {"framework": self.framework, **what})

    def _refused(self, error: KakuninError, what: dict[str, str]) -> Exception:
        # Of an agent that is revoked or suspended the ledger takes nothing.
        if isinstance(error, ScopeViolationError) and not self._anothers:
            self.note(ATTEMPT, {**what, "sqlstate": error.sqlstate})
        return self.refusal(error)

    def wrap(self, function: Callable[..., Any], **what: str) -> Callable[..., Any]:
        """The function, run only if the agent may at each call, of its own kind and signature. The body of a
        generator begins, and is guarded, with its first item."""
        return run_within(function, lambda: self.call(**what))


class Call:
    """See :meth:`Guarded.call`. For one call."""

    def __init__(self, guarded: Guarded, what: dict[str, str]) -> None:
        self._guarded = guarded
        self._what = what
        self._begun = 0.0

    def __enter__(self) -> None:
        self._guarded.check(**self._what)
        self._begun = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outcome = {"outcome": "returned"} if kind is None else {"outcome": "raised", "error": kind.__name__}
        seconds = round(time.monotonic() - self._begun, 3)
        self._guarded.note(self._guarded.event_type, {**self._what, **outcome, "seconds": seconds})

    async def __aenter__(self) -> None:
        await self._guarded.acheck(**self._what)
        self._begun = time.monotonic()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)


def synchronous(kakunin: object) -> Kakunin:
    """The client, for frameworks that ask from threads and event loops of their own: an AsyncKakunin belongs
    to one loop. Raises BadInputError for anything but a Kakunin."""
    if not isinstance(kakunin, Kakunin):
        raise BadInputError(
            f"this framework asks from several event loops, which {type(kakunin).__name__} cannot",
            "Give it a Kakunin; what is async asks that in a thread.",
        )
    return kakunin
