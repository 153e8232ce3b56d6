"""``torch.compile(model, backend="styleforge")``: the one file that knows the order of the stages.

    Dynamo's graph -> normalize -> match -> plan -> rewrite -> trunks -> regions -> the fallback compiler,
    or CUDA graphs

PyTorch finds ``styleforge`` below through the entry point group ``torch_dynamo_backends``. Nothing
in a model that the matcher does not understand is touched; a graph with nothing to fuse is handed
back as it came.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from sf_compile.graph import capturable
from sf_compile.graph.break_even import BreakEven, LargeEnough, break_even
from sf_compile.graph.match import Matches, match
from sf_compile.graph.normalize import NormalizedGraph, normalize
from sf_compile.graph.plan import Plan, plan
from sf_compile.graph.quantize import candidates, with_scales
from sf_compile.graph.regions import Region, group, is_op
from sf_compile.graph.rewrite import rewrite
from sf_compile.graph.trunks import join
from sf_compile.options import Options

if TYPE_CHECKING:
    from sf_compile.runtime.calibration import Calibration

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Analysis:
    """What the pipeline decided about one graph, before anything is rewritten."""

    normalized: NormalizedGraph
    matches: Matches
    plan: Plan


def analyse(gm: fx.GraphModule, example_inputs: list[Any], options: Options) -> Analysis:
    """Run the read-only stages on ``gm``, which is not changed."""
    normalized = normalize(gm, example_inputs)
    matches = match(normalized)
    return Analysis(normalized, matches, plan(normalized, matches, options.planned))


def compile_graph(gm: fx.GraphModule, example_inputs: list[Any], options: Options) -> Callable[..., Any]:
    """A callable that computes what ``gm`` does, its fusible sites by ``styleforge`` ops."""
    analysis = analyse(gm, example_inputs, options)
    if not analysis.plan.decisions:
        log.debug("nothing to fuse in a graph of %d nodes: it runs as it came", len(gm.graph.nodes))
        return _fallback(gm, example_inputs, options)
    if options.fallback == "eager" and _will_be_saved():
        options.check_saved()
        return _saved(analysis)
    graphs = capture_of(analysis, options)
    flat = flat_graph(analysis)
    rewritten, regions = grouped(with_scales(flat, {}) if options.precision == "int8" else flat, options)
    log.debug("fused %d sites:\n%s", len(analysis.plan.decisions), analysis.plan)
    for number, region in enumerate(regions):
        log.debug("region %d: %s", number, region)
    if options.fallback != "eager":
        return _fallback(rewritten, example_inputs, options)
    least = break_even_of(analysis, graphs, rewritten, options)
    run = _run(rewritten, graphs, options, flat)
    if least is None:
        return run
    log.debug("%s", least)
    return LargeEnough(run, gm.forward, least)


@dataclass(frozen=True)
class Capture:
    """Whether calls of one graph are captured in CUDA graphs.

    Attributes:
        refusal: Why they are not; None where they are.
        bound: The inputs, by number, that stay where they are from call to call.
    """

    refusal: str | None
    bound: frozenset[int] = frozenset()

    def __str__(self) -> str:
        return f"none: {self.refusal}" if self.refusal else "captured when a call comes a second time"


def capture_of(analysis: Analysis, options: Options) -> Capture:
    """What becomes of the calls of a graph; to be asked before it is rewritten."""
    bound = capturable.bound(analysis.normalized.graph)
    if not options.captures:
        others = "those of the fallback, if any" if options.fallback != "eager" else "not asked for"
        return Capture(others, bound)
    if not analysis.plan.decisions:
        return Capture("nothing is fused, and the graph runs as it came", bound)
    return Capture(capturable.refusal(analysis.normalized), bound)


def break_even_of(
    analysis: Analysis, capture: Capture, rewritten: fx.GraphModule, options: Options
) -> BreakEven | None:
    """From what size on calls on a CPU are fused; None where all are, of whatever size."""
    if options.fallback != "eager" or options.precision != "auto" or not analysis.plan.decisions:
        return None
    alone = sum(map(is_op, rewritten.graph.nodes))
    return break_even(analysis.normalized.graph, analysis.plan.decisions, capture.bound, alone)


def _run(
    gm: fx.GraphModule, capture: Capture, options: Options, flat: fx.GraphModule | None = None
) -> Callable[..., Any]:
    """What is called in the place of a graph that was rewritten; ``flat`` is that graph op by op."""
    from sf_compile.runtime.out_of_memory import Explained

    run: Callable[..., Any] = Explained(gm)
    if options.precision == "int8" and flat is not None:
        run = _calibrated(run, flat, options)
    if not options.captures:
        return run
    if capture.refusal is not None:
        log.warning("styleforge: no CUDA graph: %s", capture.refusal)
        return run
    from sf_compile.runtime.cuda_graphs import Graphed, cuda

    return Graphed(run, capture.bound, options.cuda_graphs_limit, options.cuda_graphs_memory, cuda())


def _calibrated(plain: Callable[..., Any], flat: fx.GraphModule, options: Options) -> Callable[..., Any]:
    """What settles in its first call where ``plain``, the graph in float16, may multiply integers."""
    from sf_compile.runtime.calibrated import Calibrated
    from sf_compile.runtime.out_of_memory import Explained

    def prepare(calibration: Calibration) -> Callable[..., Any]:
        if not calibration.scales:
            return plain
        return Explained(grouped(with_scales(flat, calibration.scales), options)[0])

    return Calibrated(plain, lambda inputs: calibration_of(flat, inputs, options), prepare)


def calibration_of(flat: fx.GraphModule, inputs: Sequence[Any], options: Options) -> Calibration:
    """What a call with ``inputs`` settles about ``flat``, a rewritten graph op by op.

    Raises:
        NotTelling: its results say nothing about those of other calls.
    """
    from sf_compile.runtime.calibration import calibrate

    quantize = functools.partial(with_scales, flat)
    return calibrate(flat, inputs, candidates(flat), quantize, options.min_psnr)


def flat_graph(analysis: Analysis) -> fx.GraphModule:
    """The graph that replaces Dynamo's, made of the copy in ``analysis``, op by op."""
    import sf_compile.ops  # noqa: F401  registers the ops that rewrite calls by name

    return rewrite(analysis.normalized, analysis.plan)


def grouped(gm: fx.GraphModule, options: Options) -> tuple[fx.GraphModule, list[Region]]:
    """``gm``, changed, with its trunks and regions, and the latter.

    They are for the graph that runs as it is: a compiler wants to see the ops themselves.
    """
    from sf_compile.ops.region import runner

    if options.fallback != "eager":
        return gm, []
    join(gm)
    return gm, group(gm, runner)


def _will_be_saved() -> bool:
    """Whether ``torch.compile(...).aot_compile(...)`` is asking: it wants a callable that it can save."""
    return bool(getattr(torch._functorch.config, "force_autograd_cache", False))


def _saved(analysis: Analysis) -> Callable[..., Any]:
    from sf_compile.saved import SavedGraph

    rewritten = rewrite(analysis.normalized, analysis.plan)
    join(rewritten)
    return SavedGraph(rewritten, in_regions)


def in_regions(gm: fx.GraphModule) -> Callable[..., Any]:
    """What runs a rewritten graph, its fused ops grouped into regions; ``gm`` is changed."""
    from sf_compile.ops.region import runner

    group(gm, runner)
    return _run(gm, Capture(None), Options())


def _fallback(gm: fx.GraphModule, example_inputs: list[Any], options: Options) -> Any:
    if options.fallback == "eager":
        if _will_be_saved():
            return torch._dynamo.lookup_backend("eager")(gm, example_inputs)
        return gm.forward
    if callable(options.fallback):
        return options.fallback(gm, example_inputs)
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    mode = list_mode_options(options.mode) if options.mode != "default" else None
    return compile_fx(gm, example_inputs, config_patches=mode)


def styleforge(
    gm: fx.GraphModule,
    example_inputs: list[torch.Tensor],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The torch.compile backend.

    Args:
        gm: The graph that Dynamo captured; never modified.
        example_inputs: Its (fake) inputs.
        options: Settings by name; see ``sf_compile.Options``.
        mode: torch.compile's mode.

    Raises:
        ValueError: for an unknown option or a wrong value.
    """
    return compile_graph(gm, example_inputs, Options.build(options, mode))
