"""Signers: who holds a private key, and how a digest gets signed by it.

Everything that signs in the kit asks a :class:`Signer`, so that a key in AWS KMS, in a PKCS #11 token and
on a laptop are used alike; a :class:`KeyStore` makes keys and finds them again. :func:`open_signer` and
:func:`open_keys` take one by URI. The JWTs that PostgREST verifies can be signed by an :class:`ECDSASigner`
as well. All are safe to use from several threads, and may block on the network or a device: asynchronous
callers run them in a thread.
"""

from __future__ import annotations

from .base import ECDSASigner, KeyStore, Signer, check_ec_key, check_rsa_key, subject_key_id
from .kms import KMSECDSASigner, KMSKeys, KMSSigner
from .local import LocalECDSASigner, LocalKeys, LocalSigner
from .pkcs11 import PKCS11ECDSASigner, PKCS11Keys, PKCS11Signer, TokenName
from .uri import open_jwt_signer, open_keys, open_signer

__all__ = [
    "ECDSASigner",
    "KMSECDSASigner",
    "KMSKeys",
    "KMSSigner",
    "KeyStore",
    "LocalECDSASigner",
    "LocalKeys",
    "LocalSigner",
    "PKCS11ECDSASigner",
    "PKCS11Keys",
    "PKCS11Signer",
    "Signer",
    "TokenName",
    "check_ec_key",
    "check_rsa_key",
    "open_jwt_signer",
    "open_keys",
    "open_signer",
    "subject_key_id",
]
