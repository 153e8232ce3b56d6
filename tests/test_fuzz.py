"""Networks of hypothesis's choice: the backend never changes a result. docs/fuzzing.md says how to run more.

A failing network is printed as a file that runs alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import fuzz.backend
import fuzz.properties
import pytest
import torch
from fuzz.networks import programs
from fuzz.programs import Program, printed
from fuzz.properties import Run, check, check_explained
from fuzz.rounding import MORE_RUNS, RUNS, noise
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import nn

from sf_compile.backend import compile_graph
from sf_compile.ops.residual_trunk import residual_trunk
from sf_compile.options import Options

EXAMPLES = int(os.environ.get("STYLEFORGE_FUZZ_EXAMPLES", "0"))
SEED = int(os.environ.get("STYLEFORGE_FUZZ_SEED", "0"))
SECONDS = float(os.environ.get("STYLEFORGE_FUZZ_SECONDS", "inf"))
"""After so many no further network is compared; one that has failed is shrunk only until then."""
# A tenth of the networks and more must have something fused, or the run says little.
FEWEST_FUSED = 0.1


def run(test: Callable[[Program], None], strategy: Any, examples: int) -> None:
    """Run ``test`` on networks that are the same in every run, unless a seed asks for others."""
    configured = settings(
        max_examples=EXAMPLES or examples, deadline=None, derandomize=not SEED, database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )(given(strategy)(test))  # fmt: skip
    (seed(SEED)(configured) if SEED else configured)()


def compare(device: str, examples: int) -> None:
    """Compare compiled networks with eager ones, until the time is over, and print how many were fused.

    Once the time is over only networks that are known to fail are run: what hypothesis then asks about a
    simpler one is answered at once, and what it prints at the end is the simplest that was found.
    """
    fused: list[bool] = []
    failed: set[Program] = set()
    end = time.monotonic() + SECONDS

    def compiled_equals_eager(program: Program) -> None:
        if time.monotonic() > end and program not in failed:
            return
        failed.add(program)
        fused.append(check(program))
        failed.remove(program)

    run(compiled_equals_eager, programs(device), examples)
    # fuzz/__main__.py reads this line.
    print(f"{len(fused)} networks on {device}, seed {SEED}: {sum(fused)} with something fused")
    assert sum(fused) >= FEWEST_FUSED * len(fused)


def test_compiled_equals_eager():
    compare("cpu", 250)


@pytest.mark.gpu
def test_compiled_equals_eager_on_a_gpu(strict_float32, monkeypatch):
    # Else eager PyTorch's own transposed convolutions in float32 have other bits in every call.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    compare("cuda", 1000)


def test_explain_names_what_then_runs():
    run(check_explained, programs(), 25)


STYLE = Program(
    modules=(("conv", "nn.Conv2d(3, 4, 3)"), ("norm", "nn.InstanceNorm2d(4, affine=True)")),
    statements=("t0 = F.pad(x, (1, 1, 1, 1), mode='reflect')", "t1 = F.relu(self.norm(self.conv(t0)))"),
    results=("t1",),
    sizes=((2, 3, 8, 9), (1, 3, 12, 8)),
)


PADDED = "F.pad({}, (1, 1, 1, 1), mode='reflect')"
TRUNK = Program(
    modules=(
        *((f"conv{i}", "nn.Conv2d(4, 4, 3)") for i in range(6)),
        *((f"norm{i}", "nn.InstanceNorm2d(4, affine=True)") for i in range(6)),
    ),
    statements=(
        f"t0 = F.relu(self.norm0(self.conv0({PADDED.format('x')})))",
        f"t1 = F.relu(self.norm1(self.conv1({PADDED.format('t0')})))",
        f"t2 = t0 + self.norm2(self.conv2({PADDED.format('t1')}))",
        f"t3 = F.relu(self.norm3(self.conv3({PADDED.format('t2')})))",
        f"t4 = t2 + self.norm4(self.conv4({PADDED.format('t3')}))",
        f"t5 = self.norm5(self.conv5({PADDED.format('t4')}))",
    ),
    results=("t5",),
    sizes=((1, 4, 12, 12),),
    grad="no_grad",
)


@pytest.mark.parametrize("program", [STYLE, TRUNK], ids=["one layer", "a trunk of two blocks"])
def test_a_style_network_passes_and_is_fused(program):
    assert check(program)


def test_the_trunk_of_two_blocks_is_one_op():
    made, loaded = [], TRUNK.load()

    def backend(gm, example_inputs):
        fused = compile_graph(gm, example_inputs, Options())
        made.extend(fuzz.backend._ops(fused.__self__))
        return fused

    with torch.no_grad():
        torch.compile(loaded.network(), backend=backend)(loaded.picture(TRUNK.sizes[0]))
    assert [op.target for op in made].count(residual_trunk) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda out: (out[0] * 1.001,),
        lambda out: (out[0].contiguous(memory_format=torch.channels_last),),
        lambda out: (out[0].double(),),
        lambda out: (out[0].expand_as(out[0])[:1],),
    ],
    ids=["a thousandth too bright", "other strides", "another dtype", "one image of two"],
)
def test_a_backend_that_is_wrong_is_caught(wrong, monkeypatch):
    honest = fuzz.backend.compile_graph

    def compile_graph(gm, example_inputs, options):
        forward = honest(gm, example_inputs, options)
        rewritten = forward.__self__

        class Wrong:
            """What is called in the rewritten graph's place, and looks like its method."""

            __self__ = rewritten

            def __call__(self, *args):
                return wrong(forward(*args))

        return Wrong()

    monkeypatch.setattr(fuzz.backend, "compile_graph", compile_graph)
    with pytest.raises(AssertionError):
        check(STYLE)


def test_what_eager_refuses_is_refused_and_what_it_computes_is_not():
    too_large = Program((), ("t0 = F.pad(x, (9, 0, 0, 0), mode='reflect')",), ("t0",), ((1, 3, 8, 9),))
    assert not check(too_large)


def test_what_the_fallback_alone_refuses_is_no_fault_of_the_backend():
    recorded = (*STYLE.statements, "with torch.enable_grad():\n    t2 = self.conv2(t1)")
    program = replace(
        STYLE, modules=(*STYLE.modules, ("conv2", "nn.Conv2d(4, 4, 3)")), statements=recorded,
        results=("t2",), grad="inference_mode", fallback="aot_eager",
    )  # fmt: skip
    assert check(program) and check(replace(program, fallback="eager"))


@pytest.mark.gpu
def test_a_write_that_the_fallback_alone_refuses_is_no_fault_of_the_backend():
    """Eager on a GPU writes a number to a column of a picture whose images are one (torch 2.11)."""
    program = Program(
        (), ("x[..., 0] = 1",), ("x",), ((2, 32, 32, 32),),
        device="cuda", dtype="float16", layout="expanded", fallback="aot_eager",
    )  # fmt: skip
    assert not check(program)


def test_a_sum_of_what_cancels_is_known_to_be_rounded():
    x = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(512)

    def run():
        return [x.mean() + 1e-6]

    (worst,) = noise(run, run(), torch.float32)
    assert 1e-3 < worst < 1


def test_a_gradient_whose_terms_cancel_is_known_to_be_rounded():
    """That of a bias which a norm removes: of a convolution's gradients, the sum over their pixels."""
    x = torch.ones(1, 1, 32, 32, dtype=torch.float64)
    weight, bias = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    gradient = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(512).view(x.shape)
    leaves = [weight.requires_grad_(), bias.requires_grad_()]

    def run():
        found = torch.autograd.grad(torch.conv2d(x, *leaves), leaves, gradient)
        return [g + 1e-6 for g in found]

    assert all(1e-3 < worst < 200 for worst in noise(run, run(), torch.float32))


def test_gradients_of_planes_that_are_exactly_constant_are_known_to_be_rounded():
    """Each norm magnifies a gradient by 316, unless the rounding of the forward pass has made a texture."""
    x = torch.ones(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    gradient = torch.linspace(0, 1, 16, dtype=torch.float64).view(x.shape)

    def run():
        y = x
        for _ in range(4):
            y = torch.nn.functional.instance_norm(y)
        (found,) = torch.autograd.grad(y, x, gradient)
        return [found.sum().view(1) + 1]

    assert noise(run, [torch.ones(1)], torch.float32)[0] > 10


def test_a_pixel_that_may_cross_a_bend_is_found_by_more_runs():
    just_below = torch.tensor([1 - 0.8 * torch.finfo(torch.float32).eps], dtype=torch.float64)

    def run():  # one rounding in ten carries it past the step at 1
        return [1 + (just_below * 1 > 1).double()]

    assert noise(run, run(), torch.float32, MORE_RUNS)[0] > 0.5


@pytest.mark.parametrize("explained", [RUNS, MORE_RUNS, MORE_RUNS + 1])
def test_an_error_that_rounding_explains_is_no_fault(explained, monkeypatch):
    """What few runs do not explain is asked of more, and of no more than those."""
    monkeypatch.setattr(
        fuzz.properties, "noise", lambda run, exact, dtype, runs: [float(runs >= explained)] * len(exact)
    )
    exact, off = torch.ones(4), torch.full((4,), 1.01)
    runs = [Run((out,), {"output 0": out}, {}, None) for out in (exact, off)]
    loaded = SimpleNamespace(network=lambda: nn.Identity(), picture=lambda size: torch.ones(4))
    monkeypatch.setattr(fuzz.properties, "call", lambda *_: runs[0])
    with nullcontext() if explained <= MORE_RUNS else pytest.raises(AssertionError, match="rounding"):
        fuzz.properties._check_numbers(STYLE, loaded, (4,), *runs, True)


@pytest.mark.parametrize(
    ("grad", "gradients"),
    [("no_grad", []), ("enable_grad", [f"gradient {i}" for i in range(4)])],
    ids=["outputs", "gradients, of an input that is written to"],
)
def test_a_failing_network_is_printed_as_a_file_that_runs_alone(grad, gradients, tmp_path):
    from test_package import ROOT
    from test_package import run as run_alone

    program = replace(STYLE, grad=grad, input_reused=True)

    def fails(_: Program) -> None:
        raise AssertionError("wrong")

    with pytest.raises(AssertionError) as raised:
        run(fails, st.just(program), 1)
    shown = "\n".join(raised.value.__notes__)
    file = printed("\n".join(f"E       {line}" for line in shown.splitlines()))
    assert file == program.source
    output, _ = run_alone(file, tmp_path, ROOT)
    shown_of = [line.split(" (")[0] for line in output.splitlines()]
    assert shown_of == [f"{size} {what}" for size in program.sizes for what in ("output 0", *gradients)]
    assert all(float(line.split("tensor(")[1].split(",")[0]) < 1e-5 for line in output.splitlines())
