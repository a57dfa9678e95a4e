"""HTTP gateways: which agent a request is of, and whether it may.

``kakunin_db.middleware.asgi`` is for Starlette, FastAPI, Litestar and whatever else speaks ASGI, ``.wsgi``
for Flask and the like, ``.django`` for Django, ``.signature`` for agents that sign their requests (and needs
the extra ``http``). docs/middleware.md says what is demanded and what is answered.
"""

from __future__ import annotations

from .core import Refused, VerifiedAgent, refusal
from .gateway import AsyncGateway, Gateway, MemoryNonces, Nonces

__all__ = ["AsyncGateway", "Gateway", "MemoryNonces", "Nonces", "Refused", "VerifiedAgent", "refusal"]
