"""What a call is predicted to need, beside what was measured; and what is said when memory runs out."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from graphs import rewritten_graph
from torch import nn
from torch._subclasses import FakeTensorMode

import sf_compile
from sf_compile.backend import analyse, styleforge
from sf_compile.graph.capturable import bound
from sf_compile.models import TransformerNet
from sf_compile.options import Options
from sf_compile.runtime import out_of_memory
from sf_compile.runtime.memory import MEBIBYTE, Memory, mebibytes
from sf_compile.runtime.memory_prediction import predict
from sf_compile.runtime.out_of_memory import Explained, OutOfMemory

BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks"
ROWS = [
    row
    for name in ("float16", "float16-8k")
    for row in json.loads((BENCHMARKS / f"h200-network-{name}.json").read_text())
    if row["peer"] == "styleforge" and row["condition"] == "cool"
]


def rewritten(model, *inputs):
    """The graph that replaces a model's, its example inputs, and which of them are the model's own."""
    found = []

    def backend(gm, examples):
        own = bound(gm.graph)
        found.append((rewritten_graph(analyse(gm, examples, Options()), Options())[0], examples, own))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(*inputs)
    return found[0]


def of_size(graph, *shape):
    """What is predicted for a picture of another size; no memory is taken for it."""
    gm, examples, own = graph
    with FakeTensorMode():
        pictures = [torch.empty(shape, dtype=x.dtype) if i not in own else x for i, x in enumerate(examples)]
    return predict(gm, pictures, own)


@pytest.fixture(scope="module")
def transformer_net():
    torch._dynamo.reset()
    return rewritten(TransformerNet().eval().half(), torch.rand(1, 3, 32, 32).half())


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{row['batch']}x{row['height']}x{row['width']} graph={row['graphs']}"
)
def test_the_prediction_is_what_was_measured(row, transformer_net):
    found = of_size(transformer_net, row["batch"], 3, row["height"], row["width"])
    # In both rows the caller's input is not counted; a captured call has an input of its own.
    predicted = found.peak if row["graphs"] else found.activations
    assert predicted / MEBIBYTE == pytest.approx(row["peak_mb"], rel=0.03)
    assert found.exact


def test_a_picture_of_8k_is_predicted_in_64_bits(transformer_net):
    found = of_size(transformer_net, 1, 3, 4320, 7680)
    assert found.input == 3 * 4320 * 7680 * 2 == found.output
    assert found.activations / MEBIBYTE == pytest.approx(4 * 759.4, rel=0.01)


def test_the_batch_counts(transformer_net):
    one, many = (of_size(transformer_net, n, 3, 256, 256) for n in (1, 64))
    assert many.input == 64 * one.input and many.activations == pytest.approx(64 * one.activations, rel=0.01)
    assert many.packed_weights == one.packed_weights


def test_the_same_with_and_without_regions():
    torch._dynamo.reset()
    model, x = TransformerNet(8, 2).eval().half(), torch.rand(1, 3, 64, 64).half()
    gm, examples, own = rewritten(model, x)
    flat = []

    def backend(gm, inputs):
        options = Options(fallback=lambda gm, inputs: gm.forward)
        flat.append(rewritten_graph(analyse(gm, inputs, options), options)[0])
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
    with_regions, without = predict(gm, examples, own), predict(flat[0], examples, own)
    assert without.activations == pytest.approx(with_regions.activations, rel=0.05)
    assert (without.input, without.output) == (with_regions.input, with_regions.output)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.last = nn.Conv2d(16, 3, 1)
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))

    def forward(self, x):
        y = F.relu(F.instance_norm(self.first(F.pad(x - self.mean, (1, 1, 1, 1), mode="reflect"))))
        return torch.sort(self.last(y), dim=-1).values


def test_operations_of_pytorch_are_counted_by_their_results_and_said_to_be_more():
    gm, examples, own = rewritten(Mixed().eval(), torch.rand(1, 3, 40, 50))
    found = predict(gm, examples, own)
    assert not found.exact and "operations of PyTorch" in str(found)
    assert found.input == found.output == 3 * 40 * 50 * 4
    assert found.activations >= 16 * 40 * 50 * 4


def test_numbers_that_dynamo_keeps_in_tensors():
    torch._dynamo.reset()
    found = []

    def backend(gm, examples):
        found.append(predict(rewritten_graph(analyse(gm, examples, Options()), Options())[0], examples))
        return gm.forward

    with torch.no_grad():
        torch.compile(TransformerNet(4, 1).eval(), backend=backend, dynamic=True)(torch.rand(1, 3, 16, 24))
    assert found[0].output == 3 * 16 * 24 * 4


def test_nothing_runs_and_autocast_is_left():
    def model(x):
        with torch.autocast("cpu", torch.bfloat16):
            return F.relu(F.instance_norm(x)) @ x

    gm, examples, own = rewritten(model, torch.rand(1, 3, 8, 8))
    predict(gm, examples, own)
    assert not torch.is_autocast_enabled("cpu")


def test_the_text_and_the_dict():
    found = Memory(int(1.5 * MEBIBYTE), 12 * MEBIBYTE, 100 * MEBIBYTE, 65536, 4 * MEBIBYTE, True)
    assert found.peak == found.input + found.output + found.activations + found.workspaces
    assert str(found) == (
        "114 MiB at the peak of a call (input 1.5, output 12, activations 100, workspaces 0.062); "
        "packed weights 4"
    )
    assert found.to_dict()["peak"] == found.peak
    assert mebibytes(0) == "0" and mebibytes(20 * MEBIBYTE) == "20"


def test_explain_predicts():
    report = sf_compile.explain(TransformerNet(8, 1).eval(), torch.rand(1, 3, 32, 32))
    (found,) = report.memory
    assert found is not None and found.input == 3 * 32 * 32 * 4
    assert f"memory on a GPU: {found}" in str(report)


@pytest.fixture
def fails(monkeypatch):
    """Makes operations run out of memory while its ``left`` is not 0."""

    class Fails:
        left = 0

    conv2d = importlib.import_module("sf_compile.ops.conv2d")
    composed = conv2d.composed

    def short(a):
        if Fails.left:
            Fails.left -= 1
            big = torch.zeros(1000, 1000)
            assert big.numel()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return composed(a)

    monkeypatch.setattr(conv2d, "composed", short)
    monkeypatch.setattr(importlib.import_module("sf_compile.cpu.kernels"), "take", lambda x: False)
    return Fails


def test_an_error_says_what_is_needed_and_the_model_goes_on(fails):
    model, x = TransformerNet(8, 1).eval(), torch.rand(1, 3, 32, 32)
    compiled = torch.compile(model, backend=styleforge)
    with torch.no_grad():
        wanted = compiled(x)
        fails.left = 1
        with pytest.raises(torch.OutOfMemoryError) as caught:
            compiled(x)
        assert torch.equal(compiled(x), wanted)
    error = caught.value
    assert type(error) is OutOfMemory and isinstance(error, RuntimeError)
    text = str(error)
    assert text.startswith("styleforge: a call with an input of 1 x 3 x 32 x 32 in float32 does not fit")
    assert error.needed is not None and str(error.needed) in text
    assert "Take a smaller picture or batch" in text and "Tried to allocate 2.00 GiB." in text
    assert "more)" not in text and "torch.no_grad" not in text
    assert error.free is None  # it happened on the CPU
    # What the failed call had made is let go though the error is kept.
    frames, trace = [], error.__cause__.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    assert len(frames) > 2
    assert not any(isinstance(v, torch.Tensor) for frame in frames[1:] for v in frame.f_locals.values())


def test_where_gradients_are_kept_the_error_says_so(fails):
    model, x = TransformerNet(8, 1).eval(), torch.rand(1, 3, 32, 32)
    compiled = torch.compile(model, backend=styleforge)
    compiled(x)
    fails.left = 1
    with pytest.raises(OutOfMemory, match=r"call it under torch\.no_grad\(\)"):
        compiled(x)


def test_an_error_is_explained_once_and_others_are_not_touched():
    def graph(error):
        def forward(x):
            raise error

        gm = torch.fx.symbolic_trace(nn.ReLU())
        gm.forward = forward
        return Explained(gm)

    first = OutOfMemory("explained", None, None)
    with pytest.raises(OutOfMemory) as caught:
        graph(first)(torch.rand(2))
    assert caught.value is first
    with pytest.raises(KeyError):
        graph(KeyError("x"))(torch.rand(2))
    with pytest.raises(OutOfMemory) as caught:
        graph(torch.OutOfMemoryError(""))(torch.rand(2, 2))
    assert str(caught.value).endswith("the model can be called again.")


def test_a_graph_that_cannot_be_predicted_is_explained_without_numbers(monkeypatch):
    def refuse(gm, inputs):
        raise RuntimeError("no")

    monkeypatch.setattr(out_of_memory, "predict", refuse)
    gm = torch.fx.symbolic_trace(nn.ReLU())

    def forward(x):
        raise torch.OutOfMemoryError("none left")

    gm.forward = forward
    with pytest.raises(OutOfMemory) as caught:
        Explained(gm)(torch.rand(2))
    assert caught.value.needed is None and "It needs" not in str(caught.value)


def test_the_gpu_is_asked_for_what_is_free(monkeypatch):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 68 * gib)
    gm = torch.fx.symbolic_trace(nn.ReLU())
    with FakeTensorMode():
        x = torch.empty(1, 3, 4, 4, device="cuda")
    error = out_of_memory._explained(gm, [x], torch.OutOfMemoryError("why"))
    said = "cuda:0 has 1.00 GiB free of 80.00; PyTorch holds 70.00, of which 2.00 in unused pieces."
    assert said in str(error)
    assert error.free == gib and error.needed is not None
