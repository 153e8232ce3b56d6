"""``explain``: what the backend would do with a model, and why it leaves the rest alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx, nn

from sf_compile import tf32
from sf_compile.backend import Analysis, analyse, break_even_of, capture_of, flat_graph, grouped
from sf_compile.graph.plan import Decision, describe, precision_of
from sf_compile.graph.quantize import candidates, with_scales
from sf_compile.graph.values import value_of
from sf_compile.options import Options
from sf_compile.runtime.memory import Memory, mebibytes
from sf_compile.runtime.memory_prediction import predict


@dataclass(frozen=True)
class Fused:
    """One fused site.

    Attributes:
        pattern: Its steps, spelled like ``"upsample+pad+conv+norm+relu"``.
        nodes: How many nodes of the original graph it replaces.
        node: Name of its convolution (or norm) in the graph.
        graph: Index of the graph, where the model breaks into several.
        op: The op that runs it.
        finish: ``"none"``, ``"here"`` or ``"deferred"``: where its norm and addition are applied.
        layout: ``"channels_last"`` or ``"contiguous"``, of its output.
        precision: What it is computed in: ``"fp16"``, ``"bf16"``, ``"tf32"``, ``"fp32"`` or ``"fp64"``;
            ``"int8"`` where the first call settles whether it multiplies 8-bit integers or is ``"fp16"``.
        why: The reason for ``finish``.
        region: Number, within its graph, of the region whose ops run as one call; None outside of regions.
    """

    pattern: str
    nodes: int
    node: str
    graph: int
    op: str
    finish: str
    layout: str
    precision: str
    why: str
    region: int | None


@dataclass(frozen=True)
class Skipped:
    """A node that a rule looked at and left alone, with the reason."""

    node: str
    reason: str
    graph: int


@dataclass(frozen=True)
class Report:
    """What ``explain`` found.

    Attributes:
        fused: The fused sites, in the order they run.
        skipped: Operations the backend knows but left alone, each with its reason.
        untouched: Names of the operations that stay as they are: the skipped, and those no rule is about.
        graph_breaks: Why Dynamo split the model into several graphs, one reason a break.
        options: The settings that were asked for.
        memory: What a call of each graph needs on a GPU; None where that cannot be told.
        cuda_graphs: For each graph, whether its calls are captured in CUDA graphs, or why not.
        break_even: For each graph, which calls on a CPU run as they came; None where none do.
        in_float16: With ``precision="int8"``, the convolutions that multiply no integers, and why.
    """

    fused: tuple[Fused, ...]
    skipped: tuple[Skipped, ...]
    untouched: tuple[str, ...]
    graph_breaks: tuple[str, ...]
    options: Options
    memory: tuple[Memory | None, ...] = ()
    cuda_graphs: tuple[str, ...] = ()
    break_even: tuple[str | None, ...] = ()
    in_float16: tuple[Skipped, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists, dicts, strings and numbers (``json.dumps`` takes it)."""
        options = asdict(self.options)
        if callable(options["fallback"]):
            options["fallback"] = getattr(options["fallback"], "__qualname__", repr(options["fallback"]))
        return {
            "fused": [asdict(site) for site in self.fused],
            "skipped": [asdict(skip) for skip in self.skipped],
            "untouched": list(self.untouched),
            "graph_breaks": list(self.graph_breaks),
            "options": options,
            "memory": [one and one.to_dict() for one in self.memory],
            "cuda_graphs": list(self.cuda_graphs),
            "break_even": list(self.break_even),
            "in_float16": [asdict(one) for one in self.in_float16],
        }

    def __str__(self) -> str:
        replaced = sum(site.nodes for site in self.fused)
        total = replaced + len(self.untouched)
        sites = "1 fused site replaces" if len(self.fused) == 1 else f"{len(self.fused)} fused sites replace"
        lines = [f"styleforge: {sites} {replaced} of {total} operations"]
        lines += _table([
            (s.node, s.pattern, f"{s.nodes} nodes", s.layout, s.precision, s.why) for s in self.fused
        ])  # fmt: skip
        regions: dict[tuple[int, int], list[str]] = {}
        for site in self.fused:
            if site.region is not None:
                regions.setdefault((site.graph, site.region), []).append(site.node)
        lines += [f"one call runs {len(names)} sites: {', '.join(names)}" for names in regions.values()]
        if self.options.precision == "int8":
            count = sum(site.precision == "int8" for site in self.fused)
            lines.append(f"int8: the first call settles the scales of {count} convolutions; in float16 stay")
            lines += _table([(s.node, s.reason) for s in self.in_float16])
        if self.skipped:
            lines.append(f"left alone, with a reason: {len(self.skipped)}")
            lines += _table([(s.node, s.reason) for s in self.skipped])
        named = {skip.node for skip in self.skipped}
        others = [name for name in self.untouched if name not in named]
        if others:
            lines.append(f"no rule is about: {', '.join(others)}")
        lines += self._memory_lines()
        if self.options.captures:
            lines += [f"CUDA graphs: {text}" for text in self.cuda_graphs]
        lines += [text for text in self.break_even if text is not None]
        lines.append(f"graph breaks: {len(self.graph_breaks)}")
        lines += [f"  {reason.strip().splitlines()[0]}" for reason in self.graph_breaks]
        return "\n".join(lines)


    def _memory_lines(self) -> list[str]:
        """What calls need on a GPU, of the graphs in which something is fused."""
        graphs = {site.graph for site in self.fused}
        found = [one for i, one in enumerate(self.memory) if i in graphs and one is not None]
        lines = [f"memory on a GPU: {one}" for one in found]
        if self.options.captures:
            lines += [f"memory with a CUDA graph: {mebibytes(one.graph)} MiB" for one in found]
        return lines


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  " + "  ".join(cells).rstrip() for cells in padded]


def explain(
    model: Any, *inputs: Any, options: Mapping[str, Any] | Options | None = None, **keyword_inputs: Any
) -> Report:
    """Say what ``torch.compile(model, backend="styleforge")`` does for these inputs.

    Runs ``model`` once on ``inputs`` under Dynamo, with its original operations: no fused op is run and no
    kernel is compiled. The decisions are those of the current grad mode, autocast state and device, and of a
    first call: like ``torch._dynamo.explain``, this calls ``torch.compiler.reset()``, so models that were
    compiled before compile again at their next call. Buffers that the run writes to (the running statistics
    of a batch norm in training) are put back.

    Args:
        model: Module or function.
        inputs: What it is called with.
        options: As in ``torch.compile(..., options=...)``.
        keyword_inputs: Keyword arguments of the call.

    Raises:
        ValueError: for unknown options.
    """
    settings = Options.build(options)
    analyses: list[Analysis] = []
    inputs_of: list[list[Any]] = []

    def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        analyses.append(analyse(gm, example_inputs, settings))
        inputs_of.append(example_inputs)
        return gm.forward

    counters = torch._dynamo.utils.counters["graph_break"]
    before = dict(counters)
    buffers = _buffers(model)
    # Without the resets, Dynamo's recompilation limit would make a model's ninth report an empty one.
    torch.compiler.reset()
    try:
        torch.compile(model, backend=collect)(*inputs, **keyword_inputs)
    finally:
        torch.compiler.reset()
        _restore(buffers)
    breaks = [reason for reason, count in counters.items() for _ in range(count - before.get(reason, 0))]
    return _report(analyses, inputs_of, breaks, settings)


def _buffers(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each buffer of ``model`` with a copy of its value."""
    buffers = model.buffers() if isinstance(model, nn.Module) else ()
    return [(buffer, buffer.detach().clone()) for buffer in buffers if not nn.parameter.is_lazy(buffer)]


def _restore(buffers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    with torch.no_grad():
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def _report(
    analyses: Sequence[Analysis], inputs: Sequence[Sequence[Any]], breaks: Sequence[str], options: Options
) -> Report:
    fused: list[Fused] = []
    skipped: list[Skipped] = []
    untouched: list[str] = []
    memory: list[Memory | None] = []
    captures: list[str] = []
    small: list[str | None] = []
    in_float16: list[Skipped] = []
    for index, analysis in enumerate(analyses):
        inside = {step.node for decision in analysis.plan.decisions for step in decision.site.steps}
        skipped += [Skipped(miss.node, miss.reason, index) for miss in analysis.matches.misses]
        untouched += [
            node.name
            for node in analysis.normalized.graph.nodes
            if node.op not in ("placeholder", "output", "get_attr") and node not in inside
        ]
        capture = capture_of(analysis, options)
        captures.append(str(capture))
        # Last, for it takes the analysed copy of the graph apart.
        flat = flat_graph(analysis)
        integers = _integers(flat, analysis.plan.decisions) if options.precision == "int8" else {}
        scales = {site: 1.0 for site, why in integers.items() if why is None}  # any: sizes depend on none
        in_float16 += [Skipped(site, why, index) for site, why in integers.items() if why is not None]
        rewritten, regions = grouped(with_scales(flat, scales) if scales else flat, options)
        least = break_even_of(analysis, capture, rewritten, options)
        small.append(None if least is None else str(least))
        memory.append(_predicted(rewritten, inputs[index], capture.bound))
        numbers = {site: number for number, region in enumerate(regions) for site in region.sites}
        fused += [_fused(decision, index, numbers, scales) for decision in analysis.plan.decisions]
    return Report(
        tuple(fused), tuple(skipped), tuple(untouched), tuple(breaks), options, tuple(memory),
        tuple(captures), tuple(small), tuple(in_float16),
    )  # fmt: skip


def _integers(flat: fx.GraphModule, decisions: Sequence[Decision]) -> dict[str, str | None]:
    """The convolutions of a graph by name: why each multiplies no 8-bit integers, None where it may."""
    found = candidates(flat)
    devices = [value_of(d.site.anchor).device for d in decisions if d.site.anchor.name in found]
    if devices and devices[0].type == "cuda":
        from sf_compile.cuda import hopper

        if not hopper.available(devices[0].index):
            elsewhere = "its kernels are for compute capability 9.0"
            return {site: reason or elsewhere for site, reason in found.items()}
    return found


def _predicted(gm: fx.GraphModule, inputs: Sequence[Any], bound: frozenset[int]) -> Memory | None:
    try:
        return predict(gm, inputs, bound)
    except (RuntimeError, TypeError, ValueError):  # sizes that depend on numbers in a tensor, for one
        return None


def _fused(decision: Decision, graph: int, regions: Mapping[str, int], scales: Mapping[str, float]) -> Fused:
    site = decision.site
    precision = "int8" if site.anchor.name in scales else _precision(decision)
    return Fused(
        pattern=site.pattern, nodes=len(site.steps), node=site.anchor.name, graph=graph,
        region=regions.get(site.anchor.name), **(describe(decision) | {"precision": precision}),
    )  # fmt: skip


def _precision(decision: Decision) -> str:
    """What a site is computed in on its device, as PyTorch's switches are now."""
    convolves = decision.storage == torch.float32 and decision.site.conv is not None
    if not convolves:
        return precision_of(decision)
    on_gpu = value_of(decision.site.anchor).device.type == "cuda"
    return "tf32" if on_gpu and tf32.allowed(decision.precision) else "fp32"
