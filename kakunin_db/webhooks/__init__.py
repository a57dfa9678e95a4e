"""Webhooks: what the database decided, told to other systems.

:func:`verify_webhook` is for whoever receives one, and needs no database. What makes secrets, and what
delivers, is for the operator's command and the worker.
"""

from __future__ import annotations

from .signatures import SecretKeys, new_secret, signed_headers, verify_webhook

__all__ = ["SecretKeys", "new_secret", "signed_headers", "verify_webhook"]
