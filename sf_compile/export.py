"""``compile``: the same rewriting for a program of torch.export, which can be saved and loaded.

exported = torch.export.export(model, (x,))
fused = sf_compile.compile(exported)
torch.export.save(fused, "model.pt2")

import sf_compile.ops                      # in the process that loads: registers the fused ops
torch.export.load("model.pt2").module()(x)
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument

from sf_compile.backend import analyse
from sf_compile.graph.aten_spelling import from_aten, to_aten
from sf_compile.graph.rewrite import rewrite
from sf_compile.graph.trunks import join
from sf_compile.options import Options

log = logging.getLogger(__name__)


def compile(
    program: ExportedProgram, *, options: Mapping[str, Any] | Options | None = None
) -> ExportedProgram:
    """``program`` with its fusible sites run by ``styleforge`` ops.

    The decisions are those of the current grad mode: under ``torch.no_grad()`` a bias that a norm removes is
    left out. A program that was lowered (``run_decompositions``) has no convolutions and norms that could be
    recognised, and is returned as it is.

    Args:
        program: What ``torch.export.export`` returned; not modified.
        options: As in ``torch.compile(..., options=...)``; the fallback stays ``"eager"``.

    Returns:
        A new program of the same signature and weights, or ``program`` itself where nothing is fused. Before
        ``torch.export.load`` of it, a process must import ``sf_compile.ops``.

    Raises:
        TypeError: for anything but an ``ExportedProgram``.
        ValueError: for unknown options, another fallback than ``"eager"`` or ``precision="int8"``.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            f"sf_compile.compile takes what torch.export.export returns, got {type(program).__name__}; for a "
            'module use torch.compile(module, backend="styleforge")'
        )
    settings = Options.build(options)
    if settings.fallback != "eager":
        raise ValueError("styleforge: an exported program has no fallback but 'eager'")
    settings.check_saved()
    import sf_compile.ops  # noqa: F401  registers the ops that rewrite calls by name

    analysis = analyse(_in_dynamos_spelling(program), [], settings)
    if not analysis.plan.decisions:
        log.debug("nothing to fuse in an exported program: it stays as it is")
        return program
    module = rewrite(analysis.normalized, analysis.plan)
    join(module)
    to_aten(module.graph)
    _record_values(module.graph)
    module.graph.lint()
    module.recompile()
    log.debug("fused %d sites:\n%s", len(analysis.plan.decisions), analysis.plan)
    return _program(program, module)


def _in_dynamos_spelling(program: ExportedProgram) -> fx.GraphModule:
    """A copy of the program's graph that the stages can read."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    original = program.graph_module.graph
    value = graph.graph_copy(original, copies)
    graph.output(value).meta.update(original.output_node().meta)
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["example_value"] = node.meta["val"]
    from_aten(graph)
    return fx.GraphModule(program.graph_module, graph)


def _record_values(graph: fx.Graph) -> None:
    """Give each node the fake value of torch.export, ``val``, and take Dynamo's away."""
    fakes = (node.meta.get("val") for node in graph.nodes if node.op == "placeholder")
    mode = next(fake.fake_mode for fake in fakes if isinstance(fake, torch._subclasses.FakeTensor))
    for node in graph.nodes:
        node.meta.pop("example_value", None)
        if node.op == "call_function" and ("sites" in node.meta or "val" not in node.meta):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            with mode, torch.no_grad():
                node.meta["val"] = node.target(*args, **kwargs)


def _program(program: ExportedProgram, module: fx.GraphModule) -> ExportedProgram:
    """``program`` with another graph, whose results have other names."""
    signature = copy.deepcopy(program.graph_signature)
    (results,) = module.graph.output_node().args
    for spec, result in zip(signature.output_specs, results, strict=True):  # type: ignore[arg-type]
        if isinstance(spec.arg, TensorArgument) and isinstance(result, fx.Node):
            spec.arg.name = result.name
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
