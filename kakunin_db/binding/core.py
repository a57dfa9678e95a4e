"""The logic of a binding, without a driver: when to bind, renew and unbind.

A runner performs the steps these generators yield and sends back each outcome, or throws the driver's
exception into them. That keeps the synchronous and the asynchronous bindings the same.
"""

from __future__ import annotations

from typing import Protocol

from ..errors import BadInputError, CredentialRejectedError, named
from ..tickets import Ticket
from .bearer import TRANSACTION, UNBIND, Bearer, Left, Query, Rollback, SetAutocommit, Steps


class Channel(Protocol):
    """What the logic needs to know of a connection."""

    address: str
    login: str

    @property
    def idle(self) -> bool:
        """Open, and in no transaction."""
        ...

    @property
    def failed(self) -> bool:
        """In a transaction that can only be rolled back."""
        ...

    @property
    def closed(self) -> bool: ...

    @property
    def autocommit(self) -> bool: ...


class Core:
    """One binding of one connection."""

    def __init__(self, channel: Channel, bearer: Bearer) -> None:
        self.channel = channel
        self.bearer = bearer
        self.in_block = False  # inside a transaction block that was bound as it began
        self.left: Left | None = None  # after leave()
        self._session_ticket: Ticket | None = None
        self._session_touched = False  # whether the session, not a transaction, was ever bound

    def refresh(self) -> Steps:
        """Leaves a fresh ticket in the cache. Outside a transaction the exchange commits by itself."""
        channel = self.channel
        if self.bearer.credential is None or self.bearer.cached(channel.address, channel.login) is not None:
            return
        alone = channel.idle and not channel.autocommit
        if alone:
            yield SetAutocommit(True)
        try:
            yield from self.bearer.open(channel.address, channel.login)
        finally:
            if alone and not channel.closed:
                yield SetAutocommit(False)

    def begin(self) -> Steps:
        """Begins a transaction and binds it. A ticket whose key has been retired is replaced once."""
        yield from self.refresh()
        query = self._bind(with_begin=True)
        try:
            yield query
        except Exception as error:
            if self.channel.failed:
                yield Rollback()
            if not self._outdated(error, query):
                raise
            yield from self.refresh()
            yield self._bind(with_begin=True)

    def enter_transaction(self, left: Left | None) -> Steps:
        """Binds the transaction that is open as the block begins, unless another agent was bound in it.

        What that one's SQL has left for the commit (deferred triggers, held cursors) would run for this one.
        """
        if left is not None and left.serial != self.bearer.serial:
            transaction = yield Query(TRANSACTION)
            if transaction == left.transaction:
                raise BadInputError(
                    f"the open transaction was bound to {left.serial} before",
                    "Commit it or roll it back first.",
                )
        yield from self.bind_here()
        self.in_block = self.channel.autocommit

    def bind_here(self) -> Steps:
        """Binds the transaction that is open already."""
        yield from self.refresh()
        query = self._bind()
        try:
            yield query
        except Exception:
            self.bearer.forget(query)
            raise

    def before_statement(self) -> Steps:
        """Before any statement: makes sure the transaction it will run in is bound."""
        channel = self.channel
        self.in_block = self.in_block and not channel.idle
        if self.in_block or channel.failed:
            return
        if not channel.autocommit:
            if channel.idle:
                yield from self.begin()
            return
        if self.bearer.credential is None:
            raise BadInputError(
                "a serial binds a transaction, and this autocommit connection is in none",
                "Use conn.transaction(), or turn autocommit off.",
            )
        if self._session_ticket is not None and self._session_ticket.fresh:
            return
        idle = channel.idle
        yield from self.refresh()
        ticket = self.bearer.cached(channel.address, channel.login)
        query = self._bind(to_session=True)
        self._session_touched = True
        try:
            yield query
        except Exception as error:
            if not idle or not self._outdated(error, query):
                raise
            yield from self.refresh()
            ticket = self.bearer.cached(channel.address, channel.login)
            yield self._bind(to_session=True)
        # Made inside a transaction begun by hand, the binding goes if that is rolled back: bind again then.
        self._session_ticket = ticket if idle else None

    def leave(self) -> Steps:
        """Takes the binding off."""
        channel = self.channel
        if channel.closed:
            return
        # A failed transaction can only be rolled back. So must one begun by hand on an autocommit
        # connection be: rolled back later, it would bring the session's binding back.
        if channel.failed or (self._session_touched and not channel.idle):
            yield Rollback()
        if self._session_touched or not (channel.idle or channel.failed):
            transaction = yield Query(UNBIND)
            if not channel.idle:
                self.left = Left(self.bearer.serial, transaction)
        if self._session_touched and not channel.idle:
            raise BadInputError(
                "a binding of the session cannot be taken off inside a transaction block",
                "End the block of conn.transaction() first.",
            )

    def _outdated(self, error: Exception, query: Query) -> bool:
        """Whether the server refused a ticket that a new one may replace."""
        return isinstance(named(error), CredentialRejectedError) and self.bearer.forget(query)

    def _bind(self, *, to_session: bool = False, with_begin: bool = False) -> Query:
        return self.bearer.bind(
            self.channel.address, self.channel.login, to_session=to_session, with_begin=with_begin
        )
