"""Compare many networks in several processes: PYTHONPATH=.:tests python -m fuzz --device cuda --processes 16

Process i of them draws its networks with the seed 1000 * seed + i. Where it fails its output is kept, and the
simplest network that failed as a file that runs alone.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from fuzz.programs import printed

ROOT = Path(__file__).parents[2]
TESTS = {"cpu": "test_compiled_equals_eager", "cuda": "test_compiled_equals_eager_on_a_gpu"}
COUNTED = re.compile(r"(\d+) networks on \w+, seed (\d+): (\d+) with something fused")


def start(options: argparse.Namespace, seed: int, output: Path) -> subprocess.Popen[bytes]:
    """One process that compares its share of the networks, and writes to ``output``."""
    environment = os.environ | {
        "STYLEFORGE_FUZZ_EXAMPLES": str(-(-options.examples // options.processes)),
        "STYLEFORGE_FUZZ_SEED": str(seed), "STYLEFORGE_FUZZ_SECONDS": str(options.seconds),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    # Without the logging plugin, which keeps every debug line of Dynamo's.
    command = [sys.executable, "-m", "pytest", "-s", "-q", "-p", "no:cacheprovider", "-p", "no:logging"]
    command.append(f"{ROOT / 'tests' / 'test_fuzz.py'}::{TESTS[options.device]}")
    with output.open("wb") as stream:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)


def main() -> int:
    """Run all processes; returns how many failed."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--device", choices=TESTS, default="cpu")
    parser.add_argument("--examples", type=int, default=5000, help="networks, of all processes together")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="draw no more after so long")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="styleforge-fuzz-"))
    seeds = [1000 * options.seed + i for i in range(options.processes)]
    running = [(seed, start(options, seed, folder / f"{seed}.txt")) for seed in seeds]
    failed = compared = fused = 0
    for seed, process in running:
        code = process.wait()
        text = (folder / f"{seed}.txt").read_text(encoding="utf-8", errors="replace")
        counts = COUNTED.search(text)
        if counts is not None:
            compared, fused = compared + int(counts[1]), fused + int(counts[3])
        if code:
            failed += 1
            print(f"seed {seed} failed; all of its output is in {folder / f'{seed}.txt'}")
            network = printed(text)
            if network is not None:
                (folder / f"{seed}.py").write_text(network, encoding="utf-8")
                print(f"the simplest network that failed, also in {folder / f'{seed}.py'}:\n{network}")
            errors = (line for line in text.splitlines() if line.startswith("E   ") and "Error" in line)
            print("\n".join(errors))
    print(
        f"{compared} networks on {options.device}, seeds {seeds[0]} to {seeds[-1]}: {fused} with something "
        f"fused, {failed} of {len(seeds)} processes failed"
    )
    return failed


if __name__ == "__main__":
    sys.exit(main())
