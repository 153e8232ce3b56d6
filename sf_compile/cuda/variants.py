"""Every kernel this package can ask for, to compile them all where there is no GPU.

    python -m sf_compile.cuda.variants [ARCHITECTURE ...]

compiles each for each architecture (all supported ones by default), and fails on a compile error, a
register spill, serialised tensor-core products, or a block that needs more shared memory than the
architecture has.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from sf_compile.cuda import (
    first_conv,
    halo_variant,
    instance_norm,
    last_conv,
    mma_ceiling,
    mma_variant,
    norm_statistics,
    normalization,
    picture,
    residual_trunk,
    statistics,
)
from sf_compile.cuda.compiler import ARCHITECTURES, KernelKey, compile_log

_SPILL = re.compile(r"(\d+) bytes spill (?:stores|loads)")
_SERIALISED = re.compile(r"\(C75\d\d\)[^\n]*")  # ptxas could not overlap the products of a warpgroup


def every(arch: str) -> Iterator[tuple[str, dict[str, int]]]:
    """(source, constants) of every kernel for ``arch``.

    The fused convolutions exist for sm_90a alone, and their channel counts and kernel sizes are constants
    too: of them, the layers of the known networks stand for the rest.
    """
    yield from statistics.variants()
    yield from norm_statistics.variants()
    yield from normalization.variants()
    yield from instance_norm.variants()
    yield from picture.variants()
    yield from mma_variant.variants(arch)
    yield from mma_ceiling.variants()
    if arch == "sm_90a":
        yield from halo_variant.variants()
        yield from first_conv.variants()
        yield from last_conv.variants()
        yield from residual_trunk.variants()


def complaints(key: KernelKey) -> list[str]:
    """What ptxas reports of ``key`` that must not be, as text; compiles it anew.

    Raises:
        KernelCompileError: it does not compile.
        KernelUnavailable: NVRTC or cuda-bindings is missing.
    """
    log = compile_log(key)
    found = [f"{key}: {match.group(0)}" for match in _SPILL.finditer(log) if int(match.group(1))]
    found += [f"{key}: {warning}" for warning in _SERIALISED.findall(log)]
    if "registers" not in log:
        found.append(f"{key}: ptxas reported no resource use; its log was {log!r}")
    return found


def main(architectures: Sequence[str]) -> int:
    """Compile everything for ``architectures``; print a line each, return 0, or 1 after complaints."""
    failed = 0
    for arch in architectures:
        keys = [KernelKey(source, tuple(constants.items()), arch) for source, constants in every(arch)]
        begin = time.perf_counter()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            problems = [line for lines in pool.map(complaints, keys) for line in lines]
        seconds = time.perf_counter() - begin
        print(f"{arch}: {len(keys)} kernels in {seconds:.0f} s, {len(problems)} complaints", flush=True)
        for line in problems:
            print(f"  {line}", file=sys.stderr)
        failed += len(problems)
    return 1 if failed else 0


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(ARCHITECTURES)
    if unknown:
        sys.exit(f"unknown architecture {sorted(unknown)[0]!r}; choose from {', '.join(ARCHITECTURES)}")
    sys.exit(main(sys.argv[1:] or ARCHITECTURES))
