"""How long the command line takes to answer: processor seconds of ``--help`` and wall time of ``train --smoke``."""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time


def processor_seconds(*arguments: str) -> float:
    """User and system time of ``neurocl ARGUMENTS``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "neurocl", *arguments], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    options = parser.parse_args()
    repeats = 3 if options.quick else options.repeats
    for arguments in (("--help",), ("spiking", "train", "--help")):
        seconds = statistics.median(processor_seconds(*arguments) for _ in range(repeats))
        print(f"neurocl {' '.join(arguments):24} {seconds:6.2f} s of processor time (bound 0.30)")
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [sys.executable, "-m", "neurocl", "spiking", "train", "--smoke", "--quiet"]
        command += ["--threads", str(options.threads), "--out", f"{folder}/run"]
        subprocess.run(command, capture_output=True, check=True)
        print(f"neurocl spiking train --smoke    {time.perf_counter() - began:6.1f} s (bound 20)")


if __name__ == "__main__":
    main()
