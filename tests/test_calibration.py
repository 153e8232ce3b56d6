"""``precision="int8"``: what a call settles, who goes back to float16, and which calls multiply integers."""

from __future__ import annotations

import gc
import logging
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from test_quantize import captured
from torch import Tensor, nn

from sf_compile import ops
from sf_compile.backend import styleforge
from sf_compile.graph.quantize import candidates, with_scales
from sf_compile.models import TransformerNet
from sf_compile.ops import quantization
from sf_compile.ops.conv2d_arguments import Arguments
from sf_compile.runtime import calibration
from sf_compile.runtime.calibrated import Calibrated
from sf_compile.runtime.calibration import Calibration, NotTelling, calibrate, psnr

LOGGER = "sf_compile.runtime.calibrated"


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TransformerNet(32, 2).eval()


def picture(height: int = 24, width: int = 20, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 255


def compiled(model: nn.Module, dynamic: bool | None = None, **options):
    settings = {"precision": "int8", **options}
    return torch.compile(model, backend=styleforge, options=settings, dynamic=dynamic)


# ---- scales, and the guard ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph():
    """A rewritten network with its inputs."""
    return captured(net(), picture())


def settled(graph, min_psnr=38.0, quantize=None) -> Calibration:
    gm, inputs = graph
    return calibrate(gm, inputs, candidates(gm), quantize or (lambda s: with_scales(gm, s)), min_psnr)


def test_the_largest_number_of_an_input_becomes_the_largest_integer(graph):
    found = settled(graph)
    seen = {}

    class Looking(torch.fx.Interpreter):
        def run_node(self, n):
            if n.meta.get("sites", ("",))[0] in found.scales:
                a = Arguments(*self.fetch_args_kwargs_from_env(n)[0])
                kind = quantization.input_dtype(a.activation, a.residual is not None)
                z = ops.normalize(a.input, *a.norm, a.residual, True, out_dtype=torch.float16)
                seen[n.meta["sites"][0]] = float(z.abs().max()) / torch.iinfo(kind).max
            return super().run_node(n)

    with torch.no_grad():
        Looking(graph[0]).run(*graph[1])
    assert found.scales == pytest.approx(seen) and len(seen) == 5
    assert set(found.scales) | set(found.left) == set(candidates(graph[0]))


def test_how_close_is_said_and_is_so(graph):
    gm, inputs = graph
    found = settled(graph)
    with torch.no_grad():
        wanted = gm(*inputs)[0]
        ours = with_scales(gm, found.scales)(*inputs)[0]
    assert found.psnr == pytest.approx(psnr(wanted, ours)) and found.psnr > 38
    assert str(found).startswith("5 of 10 convolutions multiply 8-bit integers, ")
    assert f"{found.psnr:.1f} dB" in str(found) and "(38 asked)" in str(found)


def test_layers_go_back_to_float16_the_worst_first(graph):
    everywhere = settled(graph, 0.0)
    gm = graph[0]
    alone = {
        site: settled(graph, 0.0, lambda s, site=site: with_scales(gm, {site: s[site]})).psnr
        for site in everywhere.scales
    }
    worst, second, *others = sorted(alone, key=alone.get)
    assert everywhere.psnr < alone[worst]
    without = settled(graph, everywhere.psnr + 1e-3)
    assert set(without.scales) == set(alone) - {worst}
    assert without.left[worst] == f"it alone makes {alone[worst]:.1f} dB"
    assert without.psnr > everywhere.psnr
    fewer = settled(graph, without.psnr + 1e-3)
    assert set(fewer.scales) == set(others) and fewer.left[second] == f"it alone makes {alone[second]:.1f} dB"
    best = others[-1]
    only = settled(graph, alone[best] - 1e-3)
    assert set(only.scales) == {best} and only.psnr == pytest.approx(alone[best])


def test_no_layer_is_left_where_none_suffices(graph):
    found = settled(graph, 300.0)
    assert found.scales == {} and found.psnr == math.inf and len(found.left) == 10


def test_a_layer_that_breaks_the_picture_goes_back(graph):
    gm = graph[0]
    culprit = next(iter(settled(graph).scales))

    def quantize(scales):
        wrong = {site: scale * 1e4 for site, scale in scales.items() if site == culprit}
        return with_scales(gm, {**scales, **wrong})

    found = settled(graph, quantize=quantize)
    assert culprit in found.left and len(found.scales) == 4 and found.psnr >= 38


def test_what_is_not_finite_with_integers_is_as_far_as_can_be(graph):
    gm = graph[0]

    def quantize(scales):
        scaled = with_scales(gm, scales)
        return (lambda *inputs: [x * math.nan for x in scaled(*inputs)]) if scales else scaled

    found = settled(graph, 0.0, quantize)
    assert found.scales == {} and all("-inf dB" in found.left[site] for site in settled(graph).scales)


def test_decibels():
    wanted = torch.tensor([0.0, 255.0, 255.0, 0.0])
    assert psnr(wanted, wanted + 2.55) == pytest.approx(40)
    assert psnr(wanted.half(), wanted) == math.inf
    assert psnr(wanted * 0, wanted) == -math.inf
    for broken in (math.nan, math.inf):
        assert psnr(wanted, wanted * broken) == psnr(wanted, wanted + broken) == -math.inf


@pytest.mark.parametrize(
    ("result", "why"),
    [(lambda x: x * math.nan, "not finite"), (lambda x: x * 0 + 3, "constant"), (lambda x: 5, "no numbers"),
     (lambda x: x.int(), "no numbers")],
)  # fmt: skip
def test_a_call_that_tells_nothing(result, why):
    class Net(nn.Module):
        def forward(self, x):
            return result(x)

    with pytest.raises(NotTelling, match=why):
        calibrate(torch.fx.symbolic_trace(Net()), [picture()], {}, lambda s: Net(), 38.0)


def test_an_input_of_zeros_has_no_scale():
    """A scale of zero would be refused by the op: the layer stays, and the others are settled."""
    model = net()
    with torch.no_grad():
        norms = [m for m in model.modules() if isinstance(m, nn.InstanceNorm2d)]
        norms[3].weight.zero_()
        norms[3].bias.fill_(-1)  # then a ReLU: what the block's second convolution reads is zero
    gm, inputs = captured(model, picture())
    names = list(candidates(gm))
    everything = dict.fromkeys(names[3:8])  # with the second convolution of a block
    found = calibrate(gm, inputs, everything, lambda s: with_scales(gm, s), 0.0)
    assert found.left == {names[4]: "the largest number of its input is 0.0"}
    assert set(found.scales) == {names[3], *names[5:8]}


# ---- which calls do what -----------------------------------------------------------------------------------


class Stub:
    """What ``Calibrated`` is made of: runs that say what they are, and a count of the calibrations."""

    def __init__(self) -> None:
        self.calibrations, self.error = 0, None
        self.of = Calibrated(lambda *inputs: "plain", self.calibrate, self.prepare)

    def calibrate(self, inputs):
        self.calibrations += 1
        if self.error is not None:
            raise self.error
        return Calibration({"site": 0.5}, {}, 50.0, 38.0)

    def prepare(self, found):
        number = self.calibrations
        return lambda *inputs: f"integers {number}"


def parameter(*shape: int, grad: bool = False) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape or (3,)), requires_grad=grad)


@pytest.fixture
def stub():
    return Stub()


def test_the_first_call_settles_it(stub):
    weight, x = parameter(), picture()
    assert [stub.of(x, weight) for _ in range(3)] == ["integers 1"] * 3
    assert stub.of(picture(64, 48), weight) == "integers 1" and stub.calibrations == 1


def test_weights_that_are_written_are_settled_anew(stub):
    weight, x = parameter(), picture()
    stub.of(x, weight)
    with torch.no_grad():
        weight.add_(1)
    assert [stub.of(x, weight) for _ in range(2)] == ["integers 2"] * 2
    weight.data = torch.ones(3)
    assert [stub.of(x, weight) for _ in range(2)] == ["integers 3"] * 2


def test_models_that_share_a_graph_take_turns(stub):
    one, other, x = parameter(), parameter(), picture()
    assert [stub.of(x, w) for w in (one, other, one, other)] == [f"integers {i}" for i in (1, 2, 1, 2)]


def test_what_was_settled_for_weights_that_are_gone_is_dropped(stub):
    for _ in range(3):
        stub.of(picture(), parameter())
        gc.collect()
    assert stub.calibrations == 3 and len(stub.of._settled) == 0


def test_many_sets_of_weights_are_not_kept_for_ever(stub):
    weights = [parameter() for _ in range(9)]
    assert [stub.of(picture(), w) for w in weights] == [f"integers {i}" for i in range(1, 10)]
    assert stub.of(picture(), weights[-1]) == "integers 9" and stub.of(picture(), weights[0]) == "integers 10"


def test_a_call_that_needs_gradients_is_in_float16(stub, caplog):
    weight = parameter(grad=True)
    with caplog.at_level(logging.WARNING, LOGGER):
        assert [stub.of(picture(), weight) for _ in range(2)] == ["plain"] * 2
    (record,) = caplog.records
    assert "torch.no_grad() says that none are" in record.message and stub.calibrations == 0
    with torch.no_grad():
        assert stub.of(picture(), weight) == "integers 1"
    assert stub.of(picture(), weight) == "plain"
    assert stub.of(picture().requires_grad_(), parameter()) == "plain"


def test_parameters_of_inference_mode_are_in_float16(stub, caplog):
    ordinary = parameter()
    with torch.inference_mode():
        weight = parameter()
    with caplog.at_level(logging.WARNING, LOGGER):
        assert stub.of(picture(), weight) == "plain"
    assert "inference mode" in caplog.text and stub.calibrations == 0
    with torch.inference_mode():
        assert stub.of(picture(), ordinary) == "integers 1"


def test_a_call_that_tells_nothing_is_asked_again_of_the_next(stub, caplog):
    weight, x = parameter(), picture()
    stub.error = NotTelling("its result is constant")
    with caplog.at_level(logging.WARNING, LOGGER):
        assert [stub.of(x, weight) for _ in range(2)] == ["plain"] * 2
    (record,) = caplog.records
    assert "its result is constant" in record.message and stub.calibrations == 2
    stub.error = None
    assert stub.of(x, weight) == "integers 3"


def test_an_error_of_the_calibrating_call_is_the_callers(stub):
    stub.error = RuntimeError("out of luck")
    with pytest.raises(RuntimeError, match="out of luck"):
        stub.of(picture(), parameter())


def test_a_traced_call_before_any_other_is_in_float16(stub, monkeypatch):
    from sf_compile.cuda import repeated

    weight = parameter()
    monkeypatch.setattr(repeated, "watched", lambda: True)
    assert stub.of(picture(), weight) == "plain"
    monkeypatch.setattr(repeated, "watched", lambda: False)
    assert stub.of(picture(), weight) == "integers 1"
    monkeypatch.setattr(repeated, "watched", lambda: True)
    assert stub.of(picture(), weight) == "integers 1"


def test_threads_settle_it_once(stub):
    weight, x, found = parameter(), picture(), []
    start = threading.Barrier(8)

    def call():
        start.wait()
        found.append(stub.of(x, weight))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["integers 1"] * 8


def test_no_parameters_at_all(stub):
    assert [stub.of(picture()) for _ in range(2)] == ["integers 1"] * 2 and stub.calibrations == 1


# ---- through torch.compile ---------------------------------------------------------------------------------


def test_a_network_multiplies_integers_after_its_first_call(caplog):
    model, x = net(), picture()
    f, g = compiled(model), compiled(model, precision="fp16")
    with torch.no_grad(), caplog.at_level(logging.INFO, LOGGER):
        first, again, sixteen = f(x), f(x), g(x)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "5 of 10 convolutions multiply 8-bit integers" in record.message
    assert torch.equal(first, again) and not torch.equal(first, sixteen)
    assert first.dtype == x.dtype and first.stride() == sixteen.stride()
    assert psnr(sixteen, first) >= 38
    assert f"{psnr(sixteen, first):.1f} dB" in record.message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_dtypes(dtype):
    model, x = net().to(dtype), picture().to(dtype)
    with torch.no_grad():
        found, sixteen = compiled(model)(x), compiled(model, precision="fp16")(x)
    assert found.dtype == dtype and not torch.equal(found, sixteen) and psnr(sixteen, found) > 36


def test_more_than_can_be_had_is_float16_and_a_warning(caplog):
    model, x = net(), picture()
    with torch.no_grad(), caplog.at_level(logging.INFO, LOGGER):
        found = compiled(model, min_psnr=300)(x)
        sixteen = compiled(model, precision="fp16")(x)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "0 of 10 convolutions" in record.message
    assert torch.equal(found, sixteen)


def test_pictures_and_sizes_that_follow_use_the_same_scales(caplog):
    """Every graph that Dynamo makes is settled once, by whatever it is called with first.

    (Small pictures: PyTorch's own guard of a convolution has 20480 numbers on one side.)
    """
    calls = 0

    def counted(gm, examples):
        nonlocal calls
        calls += 1
        return styleforge(gm, examples, options={"precision": "int8"})

    model = net()
    f = torch.compile(model, backend=counted, dynamic=True)
    g = compiled(model, precision="fp16", dynamic=True)
    with torch.no_grad(), caplog.at_level(logging.INFO, LOGGER):
        for i, (height, width) in enumerate(((32, 40), (40, 36), (32, 40))):
            x = picture(height, width, i)
            assert psnr(g(x), f(x)) > 38
    assert calls == len(caplog.records) == 1


def test_the_first_call_writes_and_draws_once():
    """Settling runs the graph several times, of which the model knows nothing."""

    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.net(F.dropout(x.mul_(2), 0.1, True))

    model, x = Writing().eval(), picture()
    torch.manual_seed(0)
    with torch.no_grad():
        F.dropout(x, 0.1, True)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    mine = x.clone()
    f = compiled(model, min_psnr=0)
    with torch.no_grad():
        f(mine)
    assert torch.equal(mine, 2 * x) and model.calls == 1
    assert torch.equal(torch.get_rng_state(), after)


def test_a_training_step_is_that_of_float16():
    model, x = net(), picture()
    f, g = compiled(model), compiled(model, precision="fp16")
    with torch.no_grad():
        f(x)

    def gradients(of):
        model.zero_grad()
        of(x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    ours, plain = gradients(f), gradients(g)
    assert len(ours) > 20 and all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_new_weights_have_new_scales(caplog):
    model, x = net(), picture()
    f = compiled(model)
    with torch.no_grad(), caplog.at_level(logging.INFO, LOGGER):
        f(x)
        model.load_state_dict(net(1).state_dict())
        found = f(x)
        fresh = compiled(net(1))(x)
    assert torch.equal(found, fresh) and len(caplog.records) == 3


def test_a_network_without_such_layers_is_that_of_float16(caplog):
    with torch.random.fork_rng():
        model = TransformerNet(4, 1).eval()
    with torch.no_grad(), caplog.at_level(logging.INFO, LOGGER):
        found, sixteen = compiled(model)(picture()), compiled(model, precision="fp16")(picture())
    assert torch.equal(found, sixteen)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_on_a_gpu_the_kernels_are_asked(graph, monkeypatch):
    """Convolutions that no kernel of integers takes on their device stay as they are."""
    monkeypatch.setattr(calibration, "_device_refusal", lambda a: None if a.residual is None else "no kernel")
    found = settled(graph)
    assert list(found.left.values()).count("no kernel") == 2 and len(found.scales) == 3
