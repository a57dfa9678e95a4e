"""Both clients, called alike: the asynchronous one's coroutines run in a loop of their own."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import psycopg
from conftest import Database
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from kakunin_db import AsyncKakunin, Kakunin

Kind = Literal["sync", "async"]


class Client:
    """A Kakunin or an AsyncKakunin, whose methods are called alike. With ``commits``, each is followed by the
    commit of its caller."""

    def __init__(self, kind: Kind, target: Any, *, commits: bool = False, **options: Any) -> None:
        self.loop = asyncio.new_event_loop() if kind == "async" else None
        self.target = self.run(target(self)) if callable(target) else target
        self.commits = commits
        self.real: Any = (AsyncKakunin if kind == "async" else Kakunin)(self.target, **options)
        self.authorities = Methods(self, self.real.authorities)
        self.agents = Methods(self, self.real.agents)
        self.certificates = Methods(self, self.real.certificates)
        self.events = Methods(self, self.real.events)
        self.verify = Methods(self, self.real.verify)

    def run(self, value: Any) -> Any:
        return self.loop.run_until_complete(value) if self.loop and inspect.isawaitable(value) else value

    def close(self) -> None:
        self.run(self.real.aclose() if self.loop else self.real.close())
        if not isinstance(self.target, str):
            self.run(self.target.close())
        if self.loop:
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()


@dataclass
class Methods:
    client: Client
    resource: Any

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = self.client.run(getattr(self.resource, name)(*args, **kwargs))
            if self.client.commits:
                self.client.run(self.client.target.commit())
            return found

        return call


def connected(dsn: str, autocommit: bool) -> Callable[[Client], Any]:
    def connect(client: Client) -> Any:
        kind = psycopg.AsyncConnection if client.loop else psycopg.Connection
        return kind.connect(dsn, autocommit=autocommit)

    return connect


def pooled(dsn: str) -> Callable[[Client], Any]:
    def open_pool(client: Client) -> Any:
        if not client.loop:
            return ConnectionPool(dsn, min_size=1, max_size=2, open=True)

        async def opened() -> Any:
            pool = AsyncConnectionPool(dsn, min_size=1, max_size=2, open=False)
            await pool.open()
            return pool

        return opened()

    return open_pool


HOW = ["dsn", "autocommit", "transaction", "pool"]
Opener = Callable[..., Client]


@contextlib.contextmanager
def opener(kind: Kind, database: Database, **defaults: Any) -> Iterator[Opener]:
    """What opens a client as a login, by a DSN, an `autocommit` connection, a `transaction` or a `pool`."""
    with contextlib.ExitStack() as stack:

        def open_client(user: str, how: str = "dsn", **options: Any) -> Client:
            dsn = database.dsn(user)
            target = {
                "dsn": dsn,
                "autocommit": connected(dsn, True),
                "transaction": connected(dsn, False),
                "pool": pooled(dsn),
            }[how]
            client = Client(kind, target, commits=how == "transaction", **defaults | options)
            stack.callback(client.close)
            return client

        yield open_client
