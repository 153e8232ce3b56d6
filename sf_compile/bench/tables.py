"""Rows as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sf_compile.bench.rows import Row


def format_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Lay out `lines` under `header`: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *lines, strict=True)]
    table = [header, ["-" * width for width in widths], *lines]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def cell(value: float | None, form: str = ".3f") -> str:
    """Format one number of a table; ``-`` where there is none."""
    return "-" if value is None else format(value, form)


def network_table(rows: Sequence[Row]) -> str:
    """Return the network rows as text, one table for each size, dtype and condition.

    ``x`` is a peer's median over styleforge's (over its CUDA graph where that ran), so above 1 the peer
    is slower; without a styleforge row it is over eager's. ``of floor`` is the floor over the median.
    """
    header = ("peer", "precision", "graphs", "layout", "median ms", "p20", "p80", "back to back", "host us",
              "x", "of floor", "of mma.sync", "peak MiB", "cold s", "warm s", "kernels cold s",
              "kernels warm s", "error", "psnr dB")  # fmt: skip
    tables = []
    for (size, dtype, condition), group in _grouped(rows).items():
        base = _baseline(group)
        lines = [
            (
                row["peer"],
                row.get("precision") or "auto",
                "yes" if row["graphs"] else "no",
                row["layout"],
                cell(row["median_ms"]),
                cell(row["p20_ms"]),
                cell(row["p80_ms"]),
                cell(row["back_to_back_ms"]),
                cell(row["host_us"], ".0f"),
                "-" if base is None else f"{row['median_ms'] / base['median_ms']:.2f}",
                "-" if row["floor_ms"] is None else f"{row['floor_ms'] / row['median_ms']:.1%}",
                cell(row["share_of_mma"], ".1%"),
                cell(row["peak_mb"], ".0f"),
                cell(row["compile_cold_s"], ".2f"),
                cell(row["compile_warm_s"], ".2f"),
                cell(row["kernels_cold_s"], ".2f"),
                cell(row["kernels_warm_s"], ".2f"),
                cell(row["error_vs_float64"], ".1e"),
                cell(row.get("psnr_db"), ".1f"),
            )
            for row in group
        ]
        plain = _as_the_model(group)[0]
        title = f"{_network(plain)} {size} {dtype}, {condition}"
        if plain["floor_ms"] is not None:
            title += f"; floor {plain['floor_ms']:.3f} ms at {plain['ceiling_tflops']:.4g} TFLOP/s"
        tables.append(title + "\n" + format_table(header, lines))
    return "\n\n".join(tables)


def _network(row: Row) -> str:
    """Say which network a row is about."""
    weights = "" if row["checkpoint"] is None else f" of {row['checkpoint']}"
    return f"{row['network']} (width {row['network_width']}, {row['blocks']} blocks){weights}"


def _grouped(rows: Sequence[Row]) -> Mapping[tuple[str, str, str], list[Row]]:
    """Group network rows by what a ratio may be taken within."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        size = f"{row['batch']}x{row['height']}x{row['width']}"
        groups.setdefault((size, row["dtype"], row["condition"]), []).append(row)
    return groups


def _baseline(group: Sequence[Row]) -> Row | None:
    """Return the row that ratios are over: styleforge with graphs, styleforge without, or eager.

    Of several precisions the one that follows the model, where that is among them.
    """
    for peer, graphs in (("styleforge", True), ("styleforge", False), ("eager", False)):
        for row in _as_the_model(group):
            if (row["peer"], row["graphs"]) == (peer, graphs):
                return row
    return None


def _as_the_model(group: Sequence[Row]) -> list[Row]:
    """Return `group`, first the rows that were computed in what their model is."""
    return sorted(group, key=lambda row: (row.get("precision") or "auto") != "auto")


def instance_norm_table(rows: Sequence[Row]) -> str:
    """Return the instance-norm rows as text; ``x`` is a peer's time over styleforge's, or over eager's."""
    header = ("shape", "layout", "dtype", "variant", "peer", "median us", "x", "GB/s", "of copy", "error")
    base: dict[tuple[str, ...], float] = {}
    for peer in ("eager", "styleforge"):
        base |= {_case(row): row["median_us"] for row in rows if row["peer"] == peer}
    lines = [
        (
            *_case(row),
            row["peer"],
            cell(row["median_us"], ".2f"),
            "-" if _case(row) not in base else f"{row['median_us'] / base[_case(row)]:.2f}",
            cell(row["gbps"], ".0f"),
            f"{row['share_of_copy']:.1%}",
            cell(row["error_vs_float64"], ".1e"),
        )
        for row in rows
    ]
    return format_table(header, lines)


def _case(row: Row) -> tuple[str, str, str, str]:
    """Return what instance-norm rows must share for a ratio to be taken."""
    return row["shape"], row["layout"], row["dtype"], row["variant"]


def layers_table(rows: Sequence[Row]) -> str:
    """Return the rows of suite layers as text; ``x cudnn`` is a time over cuDNN's."""
    header = ("layer", "size", "dtype", "condition", "peer", "median us", "TFLOP/s", "of ceiling",
              "of mma.sync", "x cudnn", "error", "kernel")  # fmt: skip
    bare = {_layer(row): row["median_us"] for row in rows if row["peer"] == "cudnn"}
    lines = [
        (
            *_layer(row),
            row["peer"],
            cell(row["median_us"], ".2f"),
            cell(row["tflops"], ".4g"),
            f"{row['share_of_ceiling']:.1%}",
            cell(row["share_of_mma"], ".1%"),
            "-" if _layer(row) not in bare else f"{row['median_us'] / bare[_layer(row)]:.2f}",
            cell(row["error_vs_float64"], ".1e"),
            row["kernel"] or "-",
        )
        for row in rows
    ]
    return format_table(header, lines)


def _layer(row: Row) -> tuple[str, str, str, str]:
    """Return what rows of suite layers must share for a ratio to be taken."""
    return row["layer"], row["size"], row["dtype"], row["condition"]


def pipeline_table(rows: Sequence[Row]) -> str:
    """Return the rows of suite pipeline as text; ``of compute`` is a rate over that of the network alone."""
    header = ("size", "dtype", "peer", "pictures/s", "slowest", "fastest", "of compute", "error")
    lines = [
        (
            f"{row['batch']}x{row['height']}x{row['width']}",
            row["dtype"],
            row["peer"],
            cell(row["pictures_per_s"], ".1f"),
            cell(row["slowest_per_s"], ".1f"),
            cell(row["fastest_per_s"], ".1f"),
            cell(row["share_of_compute"], ".1%"),
            cell(row["error_vs_float64"], ".1e"),
        )
        for row in rows
    ]
    return format_table(header, lines)
