"""The bearer of a binding: who a session is bound for, and the steps that get and use a ticket.

Steps are written once, as generators that yield what is to be done and are sent the outcome. Each
driver's module has a runner that does them (see core.py).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..credential import AgentCredential
from ..errors import CredentialRejectedError, KakuninError, refused
from ..serials import normalize_serial
from ..tickets import Admission, Ticket, read_ticket

if TYPE_CHECKING:
    from .attempts import Recorder

INSTALLATION: Final = "select kakunin.installation_id()"
OPEN: Final = "select kakunin.open_session(%s)"
# Both arguments: a default would be worked out anew in every transaction.
BIND_TICKET: Final = "select kakunin.bind_session(%s, true)"
BIND_TICKET_TO_SESSION: Final = "select kakunin.bind_session(%s, false)"
BIND_SERIAL: Final = "select kakunin.bind_serial(%s)"
# Transactions are told apart by their start.
TRANSACTION: Final = "select extract(epoch from transaction_timestamp())::text"
UNBIND: Final = f"{TRANSACTION} from kakunin.unbind_session()"

# A ticket is renewed once this much of its life is over, so that none expires between being sent and
# being checked.
_RENEW_AFTER = 0.8


@dataclass(frozen=True)
class Query:
    """One statement giving one value; its parameter travels bound, never in the statement's text."""

    sql: str
    parameter: str | None = None
    # The first statement of a transaction, which can share BEGIN's round trip.
    with_begin: bool = False
    # What it must answer, when something else could have been put in its place.
    expected: str | None = None


def wrong_answer(query: Query, answer: Any) -> CredentialRejectedError | None:
    """The error for a connection that answered a binding with another serial, and must be closed."""
    given = answer.decode() if isinstance(answer, bytes) else answer
    if query.expected in (None, given):
        return None
    return CredentialRejectedError(
        f"the connection was bound to {given!r} in place of {query.expected}, and has been closed",
        "SQL that ran on it before has changed what its statements do. Give that agent a login of its own.",
    )


@dataclass(frozen=True)
class Left:
    """Whom a block bound that ended inside an open transaction, and which transaction that was."""

    serial: str
    transaction: str


@dataclass(frozen=True)
class SetAutocommit:
    """The connection's own mode is to be this."""

    value: bool


@dataclass(frozen=True)
class Rollback:
    """What is open on the connection is to be rolled back."""


Step = Query | SetAutocommit | Rollback | Callable[[], str]
Steps = Generator[Step, Any, None]


class Bearer:
    """Who a session is bound for: an agent's credential, or a serial on a gateway's word or by the ticket the
    gateway was given for the agent's assertion."""

    def __init__(
        self,
        credential_or_serial: AgentCredential | Admission | str,
        *,
        recorder: Recorder | None = None,
        attempts_dsn: str | None = None,
    ) -> None:
        self._recorder = recorder
        self.attempts_dsn = attempts_dsn
        self.credential: AgentCredential | None = None
        self._ticket: Ticket | None = None  # the one there is: nothing here could get another
        if isinstance(credential_or_serial, AgentCredential):
            self.credential = credential_or_serial
            self.serial = credential_or_serial.serial
        elif isinstance(credential_or_serial, Admission):
            self._ticket = credential_or_serial.ticket
            self.serial = credential_or_serial.serial
        else:
            self.serial = normalize_serial(credential_or_serial)

    def refused(
        self,
        error: BaseException,
        statement: str | bytes | None,
        address: str,
        dsn: Callable[[], str | None],
    ) -> KakuninError | None:
        """The kit's error for a statement that a policy or a scope refused, and notes an attempt; or None.

        ``dsn`` gives what another connection like the refused one is made from, or None.
        """
        ours = refused(error)
        if ours is not None and self._recorder is not None:
            self._recorder.note(self, ours, statement, address, dsn)
        return ours

    def cached(self, address: str, login: str) -> Ticket | None:
        return None if self.credential is None else self.credential.tickets.get(address, login)

    def open(self, address: str, login: str) -> Steps:
        """The steps that leave a fresh ticket in the cache; none for a gateway's serial.

        Raises CredentialRejectedError when the database is not the installation the credential is for.
        """
        credential = self.credential
        if credential is None or self.cached(address, login) is not None:
            return
        cache = credential.tickets
        installation = cache.installation(address)
        if installation is None:
            installation = uuid.UUID(str((yield Query(INSTALLATION))))
            if credential.installation_id is None:
                credential.installation_id = installation
            elif credential.installation_id != installation:
                raise CredentialRejectedError(
                    f"this database is installation {installation}, and the credential is for "
                    f"{credential.installation_id}",
                    "Connect to the right database, or make a credential for this one.",
                )
            cache.put_installation(address, installation)
            if self.cached(address, login) is not None:  # opened through another host of this installation
                return
        started = time.monotonic()
        # A callable, because signing may wait for a KMS and must not hold up an event loop.
        for_here = installation
        assertion = yield lambda: credential.assertion(for_here)
        text = yield Query(OPEN, assertion)
        if isinstance(text, bytes):  # what psycopg gives where SQL has set client_encoding to SQL_ASCII
            text = text.decode()
        _, lifetime = read_ticket(text)
        cache.put(installation, login, Ticket(text, started + lifetime * _RENEW_AFTER))

    def bind(self, address: str, login: str, *, to_session: bool = False, with_begin: bool = False) -> Query:
        """The statement that binds; a ticket must be in the cache."""
        if self.credential is None and self._ticket is None:
            return Query(BIND_SERIAL, self.serial, with_begin, self.serial)
        ticket = self._ticket or self.cached(address, login)
        if ticket is None:
            raise CredentialRejectedError(
                "the ticket is too short-lived to bind with",
                "The certificate is about to expire: certify the agent anew.",
            )
        sql = BIND_TICKET_TO_SESSION if to_session else BIND_TICKET
        return Query(sql, ticket.text, with_begin, self.serial)

    def forget(self, query: Query) -> bool:
        """Drops a ticket the server refused; True where a new one may do better."""
        if self.credential is None or query.parameter is None:
            return False
        self.credential.tickets.drop(query.parameter)
        return True
