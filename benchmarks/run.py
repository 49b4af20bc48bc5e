"""Run every benchmark, each in a process of its own, and say where it ran: what ``make bench`` calls."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

from neurocl.devices import cpu_name, versions

BENCHMARKS = (
    "start_up",
    "soft_dtw",
    "lif",
    "staer_step",
    "merging_linear_algebra",
    "merging_files",
    "trajectory_memory",
    "trajectory_forecast",
    "federated_rounds",
    "federated_clients",
)
# Peers and neurocl alike are measured with an allocator that keeps freed memory, as a neurocl run sets it.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}


def commit() -> str:
    """The commit that is measured, or ``unknown`` outside a checkout."""
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(BENCHMARKS)}; default all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    options = parser.parse_args()
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark {sorted(unknown)[0]!r}; choose from {', '.join(BENCHMARKS)}")
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    print(f"{cpu_name()}, {os.cpu_count()} cores, {options.threads} thread(s), {platform.system()}; commit {commit()}")
    print(f"{packages}; {' '.join(f'{key}={value}' for key, value in ALLOCATOR.items())}", flush=True)
    for name in options.names or BENCHMARKS:
        print(f"\n== {name}", flush=True)
        command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), "--threads", str(options.threads)]
        subprocess.run([*command, *(["--quick"] if options.quick else [])], check=True, env={**os.environ, **ALLOCATOR})


if __name__ == "__main__":
    main()
