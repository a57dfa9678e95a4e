"""Signers: who holds a private key, and how a digest gets signed by it.

Everything that signs in the kit asks a :class:`Signer`, so that a key in AWS KMS, in a PKCS #11 token and
on a laptop are used alike; a :class:`KeyStore` makes keys and finds them again. :func:`open_signer` and
:func:`open_keys` take one by URI. All are safe to use from several threads, and may block on the network or
a device: asynchronous callers run them in a thread.
"""

from __future__ import annotations

from .base import KeyStore, Signer, check_rsa_key, subject_key_id
from .kms import KMSKeys, KMSSigner
from .local import LocalKeys, LocalSigner
from .pkcs11 import PKCS11Keys, PKCS11Signer, TokenName
from .uri import open_keys, open_signer

__all__ = [
    "KMSKeys",
    "KMSSigner",
    "KeyStore",
    "LocalKeys",
    "LocalSigner",
    "PKCS11Keys",
    "PKCS11Signer",
    "Signer",
    "TokenName",
    "check_rsa_key",
    "open_keys",
    "open_signer",
    "subject_key_id",
]
