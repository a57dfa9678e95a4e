"""What verifying an exported ledger costs.

    python benchmarks/verify.py [N ...]

For each N (by default 10,000, 100,000 and 1,000,000 entries) writes a bundle to a temporary file: entries of
about 450 bytes in 200 chains, a tree head for every 10,000 of them. Verifies it in a process of its own, on
one core, from that file, and prints entries per second of that process's CPU time and of the clock, and the
most memory it held, beside what it held before it began.
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from results import record

from kakunin_db import CertificateAuthority, LocalSigner
from kakunin_db.ledger import (
    Frontier,
    TreeHead,
    authority_line,
    certificate_line,
    end_line,
    header_line,
    leaves_line,
    ledger_key_line,
    tree_head_line,
    verify_bundle,
)

CHAINS = 200
EACH = 10_000


def write(path: Path, entries: int) -> CertificateAuthority:
    """A bundle; returns the root that vouches for it."""
    installation = uuid.uuid4()
    root, signer, agent_signer = (LocalSigner.generate() for _ in range(3))
    authority = CertificateAuthority.create(root)
    key = authority.issue_ledger_key(installation, signer.public_key())
    agents = [authority.issue(uuid.uuid4(), agent_signer.public_key()) for _ in range(CHAINS)]
    named = [(str(agent.agent_id), agent.serial) for agent in agents]
    prev = ["0" * 64] * CHAINS
    frontier = Frontier()
    now = int(time.time() * 1000)
    with path.open("wb") as file:
        file.write(header_line(installation, dt.datetime.now(dt.timezone.utc)))
        file.write(authority_line(authority.certificate))
        file.write(ledger_key_line(key))
        file.writelines(certificate_line(agent.certificate) for agent in agents)
        for first in range(0, entries, EACH):
            lines, hashes = [], []
            for i in range(first, min(first + EACH, entries)):
                agent_id, serial = named[i % CHAINS]
                entry = (
                    f'{{"kakunin":"entry/1","installation":"{installation}","event_id":{i + 1},'
                    f'"recorded_at":"2026-11-23T08:15:00.{i % 1000000:06}Z","event_type":"data_access",'
                    f'"agent_id":"{agent_id}","serial":"{serial}","login":"agent_1","session_id":null,'
                    f'"chain":{i % CHAINS + 1},"sequence":{i // CHAINS + 1},"prev":"{prev[i % CHAINS]}",'
                    '"risk":{"band": "low", "score": 0.1000, "factors": {}, "agent_band": "low",'
                    f' "agent_score": 0.0000}},"metadata":{{"rows": {i % 97}, "table": "orders"}}}}'
                ).encode()
                digest = hashlib.sha256(b"\0" + entry)
                prev[i % CHAINS] = digest.hexdigest()
                hashes.append(digest.digest())
                lines.append(entry + b"\n")
            listed = b"".join(hashes)
            frontier.extend(listed)
            tree = (frontier.size, now + first, frontier.root())
            signature = signer.sign(hashlib.sha256(TreeHead.bytes_to_sign(*tree)).digest())
            head = TreeHead(installation, *tree, json.loads(ledger_key_line(key))["key_id"], signature)
            file.write(leaves_line(first, listed))
            file.writelines(lines)
            file.write(tree_head_line(head))
        file.write(end_line(entries, entries))
    return authority


def memory() -> int:
    """The most this process held so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # where getrusage() also counts what the parent held when it forked
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(bundle: Path, root: Path) -> None:
    """In the other process."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    certificate = x509.load_pem_x509_certificate(root.read_bytes())
    before, cpu, clock = memory(), time.process_time(), time.perf_counter()
    with bundle.open("rb") as file:
        report = verify_bundle(file, [certificate])
    cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
    if not report.ok:
        raise SystemExit(f"it does not verify: {report.findings[0]}")
    size = bundle.stat().st_size / report.entries
    record(
        f"entries of an exported bundle of {report.entries:,} a CPU second", f"{report.entries / cpu:,.0f}"
    )
    record("... memory, above what the process had", f"{(memory() - before) / 2**20:.0f} MiB")
    print(
        f"{report.entries:>10} {size:>8.0f} {report.heads:>6} {report.entries / cpu:>14.0f}"
        f" {report.entries / clock:>16.0f} {before / 2**20:>10.1f} {memory() / 2**20:>10.1f}"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("entries", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    options.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.measure:
        measure(*given.measure)
        return
    print(
        f"{'entries':>10} {'bytes':>8} {'heads':>6} {'a CPU second':>14} {'a second':>16}"
        f" {'MiB before':>10} {'MiB most':>10}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        bundle, root = Path(folder, "bundle.jsonl"), Path(folder, "root.pem")
        for entries in given.entries:
            authority = write(bundle, entries)
            root.write_bytes(authority.certificate.public_bytes(serialization.Encoding.PEM))
            subprocess.run([sys.executable, __file__, "--measure", bundle, root], check=True)


if __name__ == "__main__":
    main()
