"""What must hold for every network: ``check`` runs one with the backend and without, and compares."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sf_compile
from fuzz.backend import Backend, Compiled
from fuzz.programs import Loaded, Program
from fuzz.rounding import MORE_RUNS, PROMISED, RUNS, SLACK, distance, noise
from fuzz.sketch import REFUSALS


class Run(NamedTuple):
    """What one call of a network gave, or the error that it raised.

    ``results`` and ``gradients`` by name; the network's buffers and the input are results too, for a call may
    write into them. ``gradients`` is None where the backward pass itself raised.
    """

    outputs: tuple[Tensor, ...]
    results: dict[str, Tensor]
    gradients: dict[str, Tensor] | None
    error: Exception | None


@contextmanager
def _mode(program: Program) -> Iterator[None]:
    with (
        getattr(torch, program.grad)(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def call(program: Program, network: nn.Module, function: Callable[..., Any], x: Tensor) -> Run:
    """Call ``function``, ``network`` itself or its compiled form, and differentiate a sum of its outputs."""
    with _mode(program):
        try:
            outputs = function(x)
        except REFUSALS as error:  # anything else is a fault, of ours or of the fuzzer
            return Run((), {}, None, error)
    results = {f"output {i}": out for i, out in enumerate(outputs)}
    results.update((f"buffer {name}", b.clone()) for name, b in network.named_buffers())
    results["input"] = x.detach().clone()
    wanted = [(f"output {i}", o) for i, o in enumerate(outputs) if o.requires_grad]
    gradients: dict[str, Tensor] | None = {}
    if wanted and program.is_differentiated:
        if program.writes_to_input and not x.requires_grad:
            x.mul_(0.5)
        generator = torch.Generator().manual_seed(0)
        total = sum(
            (torch.rand(o.shape, generator=generator, dtype=torch.float64).to(o.device) * o.double()).sum()
            for _, o in wanted
        )
        leaves = {f"d {name}": p for name, p in network.named_parameters()}
        if x.requires_grad and x.is_leaf:
            leaves["d input"] = x
        try:
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)  # type: ignore[arg-type]
        except RuntimeError:
            gradients = None
        else:
            gradients = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
    return Run(tuple(outputs), results, gradients, None)


def _shared(tensors: Sequence[Tensor]) -> set[tuple[int, int]]:
    """Pairs of tensors that share memory."""
    numbered = [(i, t) for i, t in enumerate(tensors) if t.numel()]
    return {
        (i, j)
        for (i, a), (j, b) in itertools.combinations(numbered, 2)
        if a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    }


def check(program: Program) -> bool:
    """Raise AssertionError, with the reason, unless everything holds; whether anything was fused."""
    if program.is_misread:
        return False
    torch._dynamo.reset()
    loaded = program.load()
    try:
        return _check(program, loaded)
    finally:
        loaded.forget()


def _check(program: Program, loaded: Loaded) -> bool:
    backend = Backend(program)
    network = loaded.network()
    state = copy.deepcopy(network.state_dict())
    hooks = _hooks(network)
    compiled = torch.compile(network, backend=backend, dynamic=program.dynamic)
    fresh = True
    for size in program.sizes:
        network.load_state_dict(state)
        eager_net = loaded.network()
        x = loaded.picture(size)
        eager = call(program, eager_net, eager_net, x)
        mine = loaded.picture(size)
        ours = call(program, network, compiled, mine)
        faults = [fault for graph in backend.graphs for fault in graph.faults]
        assert not faults, "\n".join(faults)
        if eager.error is not None:
            _check_refusal(program, loaded, size, eager.error, ours.error)
            return any(graph.decisions for graph in backend.graphs)
        if ours.error is not None:
            # AOTAutograd refuses at once what eager refuses in the backward pass, and, of its own, to record
            # tensors of the inference mode for one, inside of enable_grad (torch 2.13), and to write to an
            # expanded picture, of which eager on a GPU writes a number to a column (torch 2.11).
            refuses = program.fallback != "eager" and (
                eager.gradients is None
                or _cause(_compiled_by(program.fallback, program, loaded, loaded.picture(size)).error)
                == _cause(ours.error)
            )
            assert refuses, f"eager computes what the compiled network refuses: {ours.error!r}"
            return any(graph.decisions for graph in backend.graphs)
        fused = any(graph.decisions for graph in backend.graphs)
        try:
            _check_like(eager, ours, x, mine, backend.graphs)
            _check_numbers(program, loaded, size, eager, ours, fused or program.fallback != "eager")
        except AssertionError:
            if program.fallback == "eager":
                raise
            # AOTAutograd has faults of its own (torch 2.13: nearest upsampling by 2.05, strides of size 1).
            theirs_x = loaded.picture(size)
            theirs = _compiled_by(program.fallback, program, loaded, theirs_x)
            _check_like(theirs, ours, theirs_x, mine, backend.graphs)
            if _is_right(program, loaded, size, eager, theirs):
                _check_numbers(program, loaded, size, eager, ours, True)
        _check_state(state, network, eager_net)
        if fresh:
            network.load_state_dict(state)
            again = call(program, network, compiled, loaded.picture(size))
            _check_same_bits(ours, again)
        fresh = False
    assert _hooks(network) == hooks, "the network's hooks were changed"
    for graph in backend.graphs:
        for executed in graph.executed:
            assert executed == graph.expected, f"rewritten to {graph.expected}, ran {executed}"
    return any(graph.decisions for graph in backend.graphs)


def _cause(error: Exception | None) -> str:
    """What was raised first: Dynamo's own error around it names the backend."""
    return repr(getattr(error, "inner_exception", error))


def _is_right(program: Program, loaded: Loaded, size: tuple[int, ...], eager: Run, theirs: Run) -> bool:
    """Whether the numbers of the fallback alone are eager's."""
    try:
        _check_numbers(program, loaded, size, eager, theirs, True)
    except AssertionError:
        return False
    return True


def _hooks(network: nn.Module) -> list[Any]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [(name, kind, list(getattr(m, kind))) for name, m in network.named_modules() for kind in names]


def _check_refusal(
    program: Program, loaded: Loaded, size: tuple[int, ...], eager: Exception, ours: Exception | None
) -> None:
    """What eager refuses is refused; by the error that Dynamo itself makes of it where it does.

    AOTAutograd drops what no result needs, a call that eager refuses too (torch 2.13: its fake tensors accept
    any output padding of a transposed convolution).
    """
    if isinstance(ours, type(eager)):
        return
    torch._dynamo.reset()
    fallback = "eager" if ours is not None else program.fallback
    theirs = _compiled_by(fallback, program, loaded, loaded.picture(size)).error
    assert ours is not None or (program.fallback != "eager" and theirs is None), (
        f"the compiled network computes what eager refuses: {eager!r}"
    )
    assert type(theirs) is type(ours), f"eager raises {eager!r}, the compiled network {ours!r}"


def _compiled_by(backend: str, program: Program, loaded: Loaded, x: Tensor) -> Run:
    """What a call gives with another backend of PyTorch's, without ours."""
    network = loaded.network()
    return call(program, network, torch.compile(network, backend=backend, dynamic=program.dynamic), x)


def _check_like(eager: Run, ours: Run, x: Tensor, mine: Tensor, graphs: Sequence[Compiled]) -> None:
    """Outputs are alike in all but their pixels.

    Strides may differ where a size is 1: they place no pixel, and Dynamo's fake tensors do not always foresee
    eager's (torch 2.13, a sum of tensors of strides (7, 1, 7, 1) and (7, 7, 7, 1); torch 2.11, enlarging).
    Elsewhere a result that differs from eager has the strides that Dynamo recorded.
    """
    recorded = {strides for graph in graphs for strides in graph.strides}
    assert len(eager.outputs) == len(ours.outputs)
    for i, (a, b) in enumerate(zip(eager.outputs, ours.outputs, strict=True)):
        for what in ("shape", "dtype", "device", "requires_grad", "layout"):
            assert getattr(a, what) == getattr(b, what), (
                f"output {i}: {what} is {getattr(b, what)}, in eager {getattr(a, what)}"
            )
        pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
        known = all(size == 1 or mine == theirs for size, mine, theirs in pairs)
        known = known or (b.stride() in recorded and a.stride() not in recorded)
        assert known, f"output {i}: strides {b.stride()}, in eager {a.stride()}"
    assert _shared((*eager.outputs, x)) == _shared((*ours.outputs, mine)), "other tensors share memory"


def _check_state(state: dict[str, Tensor], network: nn.Module, eager: nn.Module) -> None:
    """Parameters are as they were; buffers changed where eager's did."""
    assert list(network.state_dict()) == list(state), "the network's state has other names"
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, state[name]), f"{name} was changed"
    for name, buffer in eager.named_buffers():
        mine = network.get_buffer(name)
        if torch.equal(buffer, state[name]) or not buffer.is_floating_point():
            assert torch.equal(mine, buffer), f"{name} was changed"


def _check_same_bits(first: Run, second: Run) -> None:
    assert second.error is None, f"the second call raised {second.error!r}"
    for name, a in first.results.items():
        b = second.results[name]
        assert torch.equal(a, b) or distance(a, b) == 0, f"{name} has other bits in the second call"


def _check_numbers(
    program: Program, loaded: Loaded, size: tuple[int, ...], eager: Run, ours: Run, fused: bool
) -> None:
    """Bits where nothing was fused, the promise about errors elsewhere."""
    if not fused:
        for name, a in eager.results.items():
            b = ours.results[name]
            same = torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
            assert same, f"nothing is fused, but {name} has other bits"
    for name, a in eager.results.items():
        assert torch.equal(a.isnan(), ours.results[name].isnan()), f"{name} is NaN elsewhere"
    pairs = dict(eager.results)
    mine = dict(ours.results)
    if eager.gradients is not None:
        assert ours.gradients is not None, "eager differentiates what the compiled network does not"
        assert eager.gradients.keys() == ours.gradients.keys(), (
            f"gradients of {sorted(ours.gradients)}, in eager of {sorted(eager.gradients)}"
        )
        pairs.update(eager.gradients)
        mine.update(ours.gradients)

    def exactly() -> dict[str, Tensor]:
        # PyTorch 2.13 differentiates an instance norm wrongly on a CPU where the gradient is channels_last.
        network = loaded.network().double().to(memory_format=torch.contiguous_format)
        x = loaded.picture(size).detach().double(memory_format=torch.contiguous_format)
        x.requires_grad_(loaded.picture(size).requires_grad)
        run = call(program, network, network, x)
        assert run.error is None, f"refused in float64: {run.error!r}"
        return {**run.results, **(run.gradients or {})}

    exact = exactly()
    names = [name for name in pairs if name in exact]
    errors = {name: (distance(mine[name], exact[name]), distance(pairs[name], exact[name])) for name in names}
    worse = [name for name, (a, b) in errors.items() if not a <= PROMISED * b]
    if not worse:
        return
    dtype = getattr(torch, program.dtype)
    if any("bfloat16" in line for line in program.statements):
        dtype = torch.bfloat16

    def run() -> list[Tensor]:
        found = exactly()
        return [found[name] for name in worse]

    largest = max((float(exact[name].norm()) for name in names if name.startswith("d ")), default=0.0)

    def farther(runs: int) -> list[str]:
        """A line for each result that is farther off than ``runs`` runs of perturbed numbers make likely."""
        lines = []
        for name, floor in zip(worse, noise(run, [exact[name] for name in worse], dtype, runs), strict=True):
            a, b = errors[name]
            if name.startswith("d "):
                # A gradient that is zero (of a bias that a norm removes) is a sum whose terms cancel.
                floor += torch.finfo(dtype).eps * largest / max(float(exact[name].norm()), 1e-30)
            if not a <= max(PROMISED * b, SLACK[dtype] * floor):
                lines.append(
                    f"{name}: error {a:.2e} against float64, eager's {b:.2e}, of rounding alone {floor:.2e}"
                )
        return lines

    faults = farther(RUNS) and farther(MORE_RUNS)
    assert not faults, "\n".join(faults)


def check_explained(program: Program) -> None:
    """``explain`` names the sites that the backend then fuses, and the regions that they run in."""
    loaded = program.load()
    try:
        torch._dynamo.reset()
        backend = Backend(program)
        size = program.sizes[0]
        network = loaded.network()
        run = call(program, network, torch.compile(network, backend=backend), loaded.picture(size))
        if run.error is not None:
            return
        network = loaded.network()
        state = copy.deepcopy(network.state_dict())
        with _mode(program):
            report = sf_compile.explain(network, loaded.picture(size), options=backend.options)
        assert [(f.node, f.pattern) for f in report.fused] == [d for g in backend.graphs for d in g.decisions]
        for name, value in network.state_dict().items():
            assert torch.equal(value, state[name]), f"explain changed {name}"
    finally:
        loaded.forget()
