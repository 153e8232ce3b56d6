"""A roofline plot of rows of suite ``layers``: operations a second over operations a byte.

The roofs are what the same run measured: the rate of a matrix product in the dtype, and the bandwidth of a
large copy. A layer can be no higher than the lower of the two above its place on the x axis. ``styleforge``
and ``cudnn`` lie at different places: the bare convolution reads an input that was upsampled and padded for
it, and computes what follows an upsampling as written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sf_compile.bench.rows import BenchmarkError, Row, check_output, replacing

_TEXTS = ("run", "layer", "size", "dtype", "peer", "condition")
_NUMBERS = ("flops", "bytes", "tflops", "ceiling_tflops", "copy_gbps")
_COLOURS = {"styleforge": "tab:blue", "cudnn": "tab:orange"}
_FILLS = {"float16": "full", "bfloat16": "left"}
_MARKERS = "os^Dv<>Ph*"


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """Return the rows in `paths`, JSON lists as ``--output`` writes them, that a plot shows: the cool ones.

    Raises:
        BenchmarkError: a file cannot be read, is no such list, has a row of another suite, or none is cool.
    """
    rows: list[Row] = []
    for path in paths:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BenchmarkError(f"{path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise BenchmarkError(f"{path} is not a JSON file: {error}") from error
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise BenchmarkError(f"{path} is not a list of rows, as styleforge bench --output writes")
        for number, row in enumerate(found, start=1):
            lacking = [key for key in _TEXTS if not isinstance(row.get(key), str)]
            lacking += [key for key in _NUMBERS if not _positive(row.get(key))]
            if lacking:
                raise BenchmarkError(
                    f"row {number} of {path} has no usable {', '.join(lacking)}: "
                    "a plot needs rows of styleforge bench --suite layers"
                )
        rows += found
    cool = [row for row in rows if row["condition"] == "cool"]
    if not cool:
        raise BenchmarkError("there is no row with condition cool to plot")
    return cool


def _positive(value: Any) -> bool:
    """Whether `value` is a number that a logarithmic axis can show."""
    return isinstance(value, (int, float)) and 0 < value < float("inf")


def check_plot(path: Path, *, force: bool) -> None:
    """Refuse, before any work, a plot that could not or must not be written.

    Raises:
        BenchmarkError: not the name of a PNG file, or see `check_output`.
    """
    if path.suffix != ".png":
        raise BenchmarkError(f"{path} is not the name of a PNG file: end it in .png")
    check_output(path, force=force)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw `rows`, as :func:`read_rows` returns them, into the PNG file `path`, all or nothing.

    Raises:
        BenchmarkError: matplotlib is not installed.
    """
    try:
        # Not pyplot: this needs no window, and leaves nothing behind in the process.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchmarkError(f'--plot needs matplotlib ({error}): pip install "sf_compile[demo]"') from error
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["peer"], row["size"], row["dtype"]), []).append(row)
    for (peer, size, dtype), group in groups.items():
        x, y = zip(*((row["flops"] / row["bytes"], row["tflops"]) for row in group), strict=True)
        colour = _COLOURS.get(peer, "tab:gray")
        axes.plot(
            x, y, linestyle="none", color=colour, marker=_MARKERS[sizes.index(size) % len(_MARKERS)],
            fillstyle=_FILLS.get(dtype, "none"), label=f"{peer} {size} {dtype}",
        )  # fmt: skip
        for row, place in zip(group, zip(x, y, strict=True), strict=True):
            axes.annotate(
                row["layer"], place, xytext=(4, 3), textcoords="offset points", fontsize=6, color=colour
            )
    intensities = [row["flops"] / row["bytes"] for row in rows]
    for row in {(row["run"], row["dtype"]): row for row in rows}.values():
        ceiling, slope = row["ceiling_tflops"], row["copy_gbps"] / 1e3
        ends = min(*intensities, ceiling / slope) / 2, max(*intensities, ceiling / slope) * 2
        axes.plot(
            (ends[0], ceiling / slope, ends[1]), (ends[0] * slope, ceiling, ceiling), color="black",
            linewidth=1, label=f"{ceiling:.4g} TFLOP/s {row['dtype']}, copy {row['copy_gbps']:.4g} GB/s",
        )  # fmt: skip
    figure.legend(fontsize=7, loc="outside right upper")
    axes.grid(True, which="both", linewidth=0.3)
    axes.set_title(f"Layers of TransformerNet, {rows[0].get('gpu') or 'CPU'}")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
