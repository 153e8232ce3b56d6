"""Host side of csrc/mma_ceiling.cu: products by ``mma.sync`` and nothing else, to be timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sf_compile import tf32
from sf_compile.cuda.launcher import Kernel
from sf_compile.cuda.layout import DTYPES, multiprocessors
from sf_compile.cuda.loader import load

SOURCE = "mma_ceiling.cu"
_THREADS = 256
_BLOCKS = 2  # of a multiprocessor
_WORDS = 24  # of a lane's operands: four left ones of 4 and four right ones of 2
_PRODUCTS = 16  # of a warp in a round


def constants(dtype: torch.dtype) -> dict[str, int]:
    """The compile-time constants of the kernel for ``dtype``, float32 in TF32."""
    return {"DTYPE": DTYPES[dtype], "PARAMETER": 0, "THREADS": _THREADS, "BLOCKS": _BLOCKS}


def variants() -> Iterator[tuple[str, dict[str, int]]]:
    """Every (source, constants) that ``products`` can ask for."""
    for dtype in DTYPES:
        yield SOURCE, constants(dtype)


@functools.cache
def _kernel(index: int, dtype: torch.dtype) -> Kernel:
    return load(SOURCE, "mma_ceiling", constants(dtype), index, "PPi")


def products(operands: Tensor, rounds: int) -> tuple[Callable[[], Tensor], int]:
    """A launch on all multiprocessors, and its floating-point operations, a multiply and an add as two.

    Args:
        operands: (24, 32) words of 32 bits on a GPU: float32, or (24, 32, 2) float16 or bfloat16. Of every
            lane four left operands of a product (PTX ISA, "Matrix Fragments for mma.m16n8k16"), then four
            right ones; float32 is rounded to TF32.
        rounds: how often each of the 16 products is repeated, a multiple of 4.

    The launch returns, for every thread, the sum of what it has of all products.

    Raises:
        ValueError: `operands` or `rounds` are not such.
    """
    dtype, index = operands.dtype, operands.device.index
    pair, depth = ((), 8) if dtype == torch.float32 else ((2,), 16)
    if dtype not in DTYPES or operands.shape != (_WORDS, 32, *pair) or rounds < 4 or rounds % 4:
        raise ValueError(f"no operands and rounds of products: {tuple(operands.shape)} {dtype}, {rounds}")
    words = tf32.rounded(operands).contiguous()
    blocks = multiprocessors(index) * _BLOCKS
    sums = torch.empty(blocks * _THREADS, dtype=torch.float32, device=operands.device)
    kernel = _kernel(index, dtype)

    def launch() -> Tensor:
        kernel.launch((blocks, 1, 1), _THREADS, 0, (words.data_ptr(), sums.data_ptr(), rounds))
        return sums

    return launch, blocks * _THREADS // 32 * rounds * _PRODUCTS * 2 * 16 * 8 * depth
