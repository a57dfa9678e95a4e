"""Where benchmarks put what they measured, and the one table that `make bench` makes of it.

    python benchmarks/results.py [--only ledger,policies] [--check]

Runs every benchmark of this folder that is in RUNS, one after the other, and writes the table at the head of
docs/performance.md: what was measured, the median, and the ratio to what it was compared with in the same
run, as the median of pairs. With --check it runs them and writes nothing.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from cluster import binaries

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- written by make bench -->", "<!-- end of what make bench wrote -->"
# Minutes on two cores, all together. What takes longer has options of its own, and its figures in the text.
RUNS = {
    "session": [],
    "policies": ["--rows", "1000,10000,100000,1000000"],
    "append": ["--history", "1000,100000"],
    "ledger": ["--seconds", "2"],
    "verify": ["100000"],
    "cache": [],
    "middleware": [],
    "postgrest": [],
    "risk": [],
}
# One conversation at a time, on one processor: client and server wake each other, and on a virtual machine
# waking another processor takes longer than what is compared.
ONE_PROCESSOR = {"session", "policies", "append", "postgrest"}


def record(case: str, measured: str, against: str = "", ratio: float | None = None) -> None:
    """A line of the table: "scan of 10^6 rows", "34.1 ms", "a hand-written where", 1.04."""
    if path := os.environ.get("KAKUNIN_BENCH_RESULTS"):
        with open(path, "a") as file:
            line = {"case": case, "measured": measured, "against": against, "ratio": ratio}
            file.write(json.dumps(line) + "\n")


def machine() -> str:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB, {platform.system()} {platform.release()}"


def versions() -> str:
    server = binaries(18)
    if server is None:
        raise SystemExit("no Postgres 18: pip install 'kakunin-db[demo]'")
    said = subprocess.run([server / "postgres", "--version"], check=True, capture_output=True, text=True)
    return f"Postgres {said.stdout.split()[2]}, Python {platform.python_version()}"


def table(lines: list[tuple[str, dict[str, str | float | None]]]) -> str:
    rows = ["| | what | median | against | ratio |", "|---|---|---|---|---|"]
    for name, line in lines:
        ratio = "" if line["ratio"] is None else f"{line['ratio']:.2f}"
        rows.append(f"| {name} | {line['case']} | {line['measured']} | {line['against']} | {ratio} |")
    return "\n".join(rows)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", help="these alone, with commas between; nothing is written")
    options.add_argument("--check", action="store_true", help="run them and write nothing")
    chosen = options.parse_args()
    names = chosen.only.split(",") if chosen.only else list(RUNS)
    lines: list[tuple[str, dict[str, str | float | None]]] = []
    began = time.monotonic()
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    for name in names:
        print(f"== {name}", flush=True)
        with tempfile.NamedTemporaryFile("r") as file:
            environment = os.environ | {"KAKUNIN_BENCH_RESULTS": file.name}
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, {max(processors)} if name in ONE_PROCESSOR else processors)
            subprocess.run([sys.executable, HERE / f"{name}.py", *RUNS[name]], check=True, env=environment)
            found = [json.loads(line) for line in file]
        if not found:
            raise SystemExit(f"{name} recorded nothing")
        lines += [(name, line) for line in found]
    print(f"\n{len(lines)} lines in {(time.monotonic() - began) / 60:.1f} minutes")
    if chosen.only or chosen.check:
        print(table(lines))
        return
    before, rest = DOCUMENT.read_text().split(BEGIN)
    _, after = rest.split(END)
    today = dt.date.today().isoformat()
    head = (
        f"{versions()}, {machine()}, {today}. One run; ratios are medians of pairs. "
        f"{', '.join(sorted(ONE_PROCESSOR))}: client and server on one core."
    )
    DOCUMENT.write_text(f"{before}{BEGIN}\n{head}\n\n{table(lines)}\n{END}{after}")
    print(f"wrote {DOCUMENT.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
