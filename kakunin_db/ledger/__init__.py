"""The ledger outside the database: signed tree heads, bundles, proofs and witnesses (docs/ledger-format.md).

Nothing here trusts the database: a verifier brings the root certificates it trusts and whatever heads a
witness kept, and everything else has to follow from them.
"""

from __future__ import annotations

from .bundle import (
    MAX_LEAVES,
    MAX_LINE,
    Finding,
    Report,
    archived_line,
    authority_line,
    certificate_line,
    end_line,
    header_line,
    leaves_line,
    ledger_key_line,
    missing_line,
    tree_head_line,
    verify_bundle,
    verify_proof,
)
from .heads import FalseSignatureError, TreeHead, TrustAnchors, UntrustedKeyError
from .merkle import EMPTY_ROOT, Frontier, leaf_hash, node_hash, verify_consistency, verify_inclusion
from .witness import (
    FileWitness,
    PostgresWitness,
    S3Witness,
    Witness,
    WitnessError,
    WitnessUnavailableError,
    open_witness,
    witness_sql,
)

__all__ = [
    "EMPTY_ROOT",
    "MAX_LEAVES",
    "MAX_LINE",
    "FalseSignatureError",
    "FileWitness",
    "Finding",
    "Frontier",
    "PostgresWitness",
    "Report",
    "S3Witness",
    "TreeHead",
    "TrustAnchors",
    "UntrustedKeyError",
    "Witness",
    "WitnessError",
    "WitnessUnavailableError",
    "archived_line",
    "authority_line",
    "certificate_line",
    "end_line",
    "header_line",
    "leaf_hash",
    "leaves_line",
    "ledger_key_line",
    "missing_line",
    "node_hash",
    "open_witness",
    "tree_head_line",
    "verify_bundle",
    "verify_consistency",
    "verify_inclusion",
    "verify_proof",
    "witness_sql",
]
