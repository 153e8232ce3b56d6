"""``styleforge bench`` as the tests run it."""

from __future__ import annotations

import argparse

from sf_compile.cli import bench


def run_bench(*arguments: str, device: str = "cpu") -> int:
    """Run the command as briefly as possible and return its exit code."""
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args([*arguments, "--device", device, "--quick"]))
