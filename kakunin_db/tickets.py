"""Tickets: what a database gave for an assertion, kept until shortly before they expire."""

from __future__ import annotations

import threading
import time
import uuid
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Ticket:
    text: str
    renew_at: float  # time.monotonic()

    @property
    def fresh(self) -> bool:
        return time.monotonic() < self.renew_at


def read_ticket(text: str) -> tuple[str, int]:
    """The serial that a ticket is for, and the seconds it lives, by the server's clock alone.

    It is ``kkn1.<key>.<serial>.<issued>.<expires>.<code>``. Raises ValueError for anything else.
    """
    _, _, serial, issued, expires, _ = text.split(".")
    return serial, int(expires) - int(issued)


@dataclass(frozen=True)
class Admission:
    """Whom a gateway has admitted: a serial, and the ticket that the agent's own proof was given, if it was.

    A ticket is a bearer secret, so it is in no representation of this.
    """

    serial: str
    ticket: Ticket | None = field(default=None, repr=False)


class TicketCache:
    """A credential's tickets, one an installation and login, shared by all its bindings and threads.

    Sharing is what lets a ticket opened on a primary bind on its standbys, and spares a pool one signature
    a connection.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tickets: dict[tuple[uuid.UUID, str], Ticket] = {}
        self._installations: dict[str, uuid.UUID] = {}

    def get(self, address: str, login: str) -> Ticket | None:
        with self._lock:
            installation = self._installations.get(address)
            ticket = None if installation is None else self._tickets.get((installation, login))
        return ticket if ticket is not None and ticket.fresh else None

    def installation(self, address: str) -> uuid.UUID | None:
        with self._lock:
            return self._installations.get(address)

    def put_installation(self, address: str, installation: uuid.UUID) -> None:
        with self._lock:
            self._installations[address] = installation

    def put(self, installation: uuid.UUID, login: str, ticket: Ticket) -> None:
        with self._lock:
            self._tickets[installation, login] = ticket

    def drop(self, text: str) -> None:
        with self._lock:
            for key in [k for k, ticket in self._tickets.items() if ticket.text == text]:
                del self._tickets[key]
