"""Every precision from a model of every dtype, and autocast: dtypes, strides, errors, gradients, calls."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from networks import Net, reflect
from torch import Tensor, fx, nn

import sf_compile.ops  # noqa: F401  registers the ops
from sf_compile import explain, options, tf32
from sf_compile.backend import styleforge
from sf_compile.graph.match import match
from sf_compile.graph.normalize import normalize
from sf_compile.graph.plan import plan
from sf_compile.graph.rewrite import rewrite
from sf_compile.models import TransformerNet
from sf_compile.options import Options
from sf_compile.precision import PRECISIONS, name_of, storage

OPS = torch.ops.styleforge
STORED = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Keeping:
    """The backend with ``options``; keeps the graphs that it rewrote."""

    def __init__(self, **options: Any) -> None:
        self.options, self.graphs = options, []

    def __call__(self, gm: Any, example_inputs: list[Any]) -> Any:
        return styleforge(gm, example_inputs, options={**self.options, "fallback": self.keep})

    def keep(self, gm: Any, example_inputs: list[Any]) -> Any:
        self.graphs.append(gm)
        return gm.forward

    @property
    def calls(self) -> list[str]:
        """The functions that the last graph calls, but for what takes a result apart."""
        nodes = [n for n in self.graphs[-1].graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
        names = [getattr(n.target, "__name__", str(n.target)) for n in nodes]
        return [name for name in names if name != "getitem"]


def small_net() -> TransformerNet:
    return TransformerNet(width=8, blocks=2).eval()


def picture(height: int = 24, width: int = 20) -> Tensor:
    return torch.rand(1, 3, height, width) * 255


def assert_as_good(out: Tensor, like: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Of eager's dtype and strides, and as near as ``like``, what eager PyTorch makes in that precision."""
    assert (out.dtype, out.stride(), out.shape) == (eager.dtype, eager.stride(), eager.shape)
    rounding = relative_error(like.to(eager.dtype), exact)
    assert relative_error(out, exact) <= 1.25 * rounding + 16 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_of_a_model_of_every_dtype(precision, dtype):
    model = small_net().to(dtype)
    x = picture().to(dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    keeping = Keeping(precision=precision)
    with torch.no_grad():
        out = torch.compile(model, backend=keeping, fullgraph=True)(x)
        exact = copy.deepcopy(model).double()(x.double())
        computed = storage(precision, dtype)
        like = copy.deepcopy(model).to(computed)(x.to(computed))
        assert_as_good(out, like, model(x), exact)
    assert keeping.calls == ["conv2d.default"] * 10  # and no conversion beside them
    assert all(p.dtype == dtype and torch.equal(p, state[name]) for name, p in model.named_parameters())


def test_only_what_enters_and_leaves_is_of_the_models_dtype():
    keeping = Keeping(precision="fp16")
    with torch.no_grad():
        torch.compile(small_net(), backend=keeping)(picture())
    calls = [node for node in keeping.graphs[-1].graph.nodes if node.target is OPS.conv2d.default]
    told = [node.args[-3:-1] for node in calls]
    assert told == [("fp16", None)] * 9 + [("fp16", torch.float32)]
    assert [node.args[17] for node in calls] == [True] * 9 + [False]  # channels_last, as in a float16 model


def both_readers(m: Net, x: Tensor) -> tuple[Tensor, ...]:
    """Finished tensors with readers inside and outside of fused convolutions."""
    y = F.relu(m.norm(m.conv(reflect(x))))
    z = m.plain(m.conv(reflect(y))) + y  # y: kept, and added
    w = m.same(reflect(z))
    u = m.norm(torch.sin(y))  # y: read by PyTorch
    return w, z.mean(), m.plain(m.down(z)), u + y, m.norm(m.conv(reflect(x))) + m.skip(x)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_readers_get_the_models_dtype(precision, dtype):
    model, x = Net(both_readers).to(dtype), torch.randn(2, 4, 12, 10).to(dtype)
    with torch.no_grad():
        ours = torch.compile(model, backend=(keeping := Keeping(precision=precision)), fullgraph=True)(x)
        eager = model(x)
        exact = copy.deepcopy(model).double()(x.double())
        rounded = copy.deepcopy(model).to(STORED[precision])(x.to(STORED[precision]))
    assert "conv2d.default" in keeping.calls
    for out, reference, value, like in zip(ours, eager, exact, rounded, strict=True):
        assert (out.dtype, out.stride()) == (reference.dtype, reference.stride())
        allowed = max(relative_error(like, value), relative_error(reference, value))
        assert relative_error(out, value) <= 4 * allowed  # few numbers: some of both errors is luck


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_layout_that_eager_gives(layout):
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = small_net().to(memory_format=memory_format)
    x = picture().contiguous(memory_format=memory_format)
    with torch.no_grad():
        out = torch.compile(model, backend="styleforge", options={"precision": "fp16"})(x)
        assert (out.stride(), out.dtype) == (model(x).stride(), torch.float32)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_are_of_the_parameters_dtypes(precision, dtype):
    model, x = small_net().to(dtype), (picture() / 255).to(dtype)
    target = torch.rand(1, 3, 24, 20)

    def gradients(run: Any, net: nn.Module, x: Tensor) -> list[Tensor]:
        net.zero_grad()
        x = x.clone().requires_grad_()
        (run(x).float() - target).square().mean().mul(256).backward()  # as a GradScaler does
        return [x.grad, *(p.grad for p in net.parameters())]

    ours = gradients(torch.compile(model, backend="styleforge", options={"precision": precision}), model, x)
    wanted = [x, *model.parameters()]
    assert [g.dtype for g in ours] == [p.dtype for p in wanted] and all(g.isfinite().all() for g in ours)
    exact_net, like_net = copy.deepcopy(model).double(), copy.deepcopy(model).to(STORED[precision])
    exact = gradients(exact_net, exact_net, x.double())
    like = gradients(like_net, like_net, x.to(STORED[precision]))
    # As a whole: single biases in front of a norm have a gradient of nothing but rounding.
    flat = [torch.cat([g.double().flatten() for g in each[1:]]) for each in (ours, like, exact)]
    rounding = relative_error(flat[1].to(dtype), flat[2])
    assert relative_error(flat[0], flat[2]) <= 3 * rounding  # of terms that cancel behind a norm


def test_unknown_precisions_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"precision cannot be 'float16'; did you mean 'fp16'\?"):
        Options(precision="float16")
    with pytest.raises(ValueError, match=r"did you mean 'bf16'\? Valid: auto, fp16, bf16, tf32, fp32"):
        Options.build({"precision": "bf61"})
    with pytest.raises(RuntimeError, match=r"precision must be one of auto, .*; got 'half'"):
        call(torch.rand(1, 4, 8, 8), torch.rand(4, 4, 3, 3), precision="half")
    with pytest.raises(RuntimeError, match=r"out_dtype must be float16, .* got torch\.int32"):
        call(torch.rand(1, 4, 8, 8), torch.rand(4, 4, 3, 3), out_dtype=torch.int32)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_explain_names_the_precision_of_every_layer(precision):
    report = explain(small_net(), picture(), options={"precision": precision})
    name = {"auto": "fp32", "tf32": "fp32"}.get(precision, precision)  # a CPU has no TF32
    assert [site.precision for site in report.fused] == [name] * 10
    assert str(report).count(f"  {name}  ") == 10
    assert {site["precision"] for site in report.to_dict()["fused"]} == {name}


def test_explain_names_autocasts():
    def mixed(m: Net, x: Tensor) -> Any:
        y = m.norm(m.conv(reflect(x)))
        with torch.autocast("cpu", torch.bfloat16):
            y = m.conv(reflect(F.relu(y)))
        return m.conv(reflect(y.float()))

    report = explain(Net(mixed), torch.randn(2, 4, 12, 10))
    assert [site.precision for site in report.fused] == ["fp32", "bf16", "fp32"]


# The ops


def call(x: Tensor, weight: Tensor, *rest: Any, **changes: Any) -> Any:
    """``conv2d`` of ``x``, normalised and added to ``rest`` where there is one, with its last arguments."""
    residual = rest[0] if rest else None
    norm = (x.new_zeros(x.shape[1], dtype=torch.float32), x.new_ones(x.shape[1], dtype=torch.float32))
    transposed = changes.pop("transposed", False)
    arguments = (
        x, weight, changes.pop("bias", None), *norm, None, None, 1e-5, "relu", residual, 1, [1, 1, 1, 1],
        "zeros" if transposed else "reflect", [1, 1], changes.pop("output_activation", "none"), True, True,
        changes.pop("channels_last", False), transposed,
    )  # fmt: skip
    return OPS.conv2d.default(*arguments, changes.pop("precision", "auto"), changes.pop("out_dtype", None))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_conv2d_passes_opcheck_and_rounds_once(precision, out_dtype, transposed):
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((2, 4, 7, 6), (4, 4, 3, 3), (4,)))
    residual = torch.randn(2, 4, 7, 6, dtype=torch.float16)
    options = {"precision": precision, "out_dtype": out_dtype, "transposed": transposed, "bias": bias}
    out, mean, variance, kept = call(x, weight, residual, **options)
    stored = STORED[precision]
    assert (out.dtype, kept.dtype) == (out_dtype or stored, stored)
    assert mean.dtype == variance.dtype == torch.float32
    z = (torch.relu(x / (1 + 1e-5) ** 0.5) + residual).to(stored).double()
    assert torch.equal(kept, z.to(stored)) or relative_error(kept, z) < 2 * torch.finfo(stored).eps
    z, w, b = kept.double(), weight.to(stored).double(), bias.to(stored).double()
    if transposed:
        exact = F.conv_transpose2d(z, w, b, padding=1)
    else:
        exact = F.conv2d(F.pad(z, (1, 1, 1, 1), "reflect"), w, b)
    assert relative_error(out, exact) < torch.finfo(out.dtype).eps + 1e-6
    total = out.float().square().mean() + kept.float().mean()
    found = torch.autograd.grad(total, [x, weight, bias])
    assert [g.dtype for g in found] == [torch.float32] * 3
    arguments = (
        x, weight, bias, None, None, None, None, 1.0, "relu", residual, 1, [1, 1, 1, 1],
        "zeros" if transposed else "reflect", [1, 1], "none", True, True, True, transposed, precision,
        out_dtype,
    )  # fmt: skip
    torch.library.opcheck(OPS.conv2d.default, arguments)


def test_normalize_passes_opcheck_in_another_dtype():
    x, residual = torch.randn(2, 4, 7, 6, dtype=torch.float16), torch.randn(2, 4, 7, 6, requires_grad=True)
    vectors = [torch.rand(4) + 0.5 for _ in range(4)]
    plain = (x, *vectors, 1e-5, "relu", residual, True, 2, [1, 1, 1, 1], "reflect", None)
    arguments = (*plain, torch.float32)
    out = OPS.normalize.default(*arguments)
    assert out.dtype == torch.float32
    (gradient,) = torch.autograd.grad(out.sum(), residual)
    assert gradient.dtype == torch.float32
    torch.library.opcheck(OPS.normalize.default, arguments)
    with pytest.raises(RuntimeError, match=r"residual is torch\.float32"):
        OPS.normalize.default(*plain)


def test_auto_takes_no_mixture():
    with pytest.raises(RuntimeError, match=r"weight is torch\.float32"):
        call(torch.rand(1, 4, 8, 8).half(), torch.rand(4, 4, 3, 3))


# Autocast


def around(model: nn.Module, dtype: torch.dtype, **settings: Any) -> Callable[[Tensor], Any]:
    def run(x: Tensor) -> Any:
        with torch.autocast("cpu", dtype, **settings):
            return model(x)

    return run


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_transformer_net_under_autocast(dtype, inside, cache):
    model, x, keeping = small_net(), picture(), Keeping()
    eager = around(model, dtype, cache_enabled=cache)
    with torch.no_grad():
        if inside:
            out = torch.compile(eager, backend=keeping, fullgraph=True)(x)
        else:
            out = around(torch.compile(model, backend=keeping, fullgraph=True), dtype, cache_enabled=cache)(x)
        reference, exact = eager(x), copy.deepcopy(model).double()(x.double())
    assert_as_good(out, reference, reference, exact)
    assert [name for name in keeping.calls if "autocast" not in name] == ["conv2d.default"] * 10
    # The next layer of a style network is not finished by a pass of its own, whatever its parameters' dtype.
    assert keeping.calls.count("_enter_autocast") == int(inside)


def nested(m: Net, x: Tensor) -> tuple[Tensor, ...]:
    with torch.autocast("cpu", torch.bfloat16):
        y = F.relu(m.norm(m.conv(reflect(x))))
        with torch.autocast("cpu", enabled=False):
            z = m.norm(m.conv(reflect(y.float())))
        w = m.plain(m.conv(reflect(z)))
        return y, z, w, m.same(w)


def region_in_the_middle(m: Net, x: Tensor) -> tuple[Tensor, ...]:
    y = F.relu(m.norm(m.conv(reflect(x))))
    with torch.autocast("cpu", torch.bfloat16):
        z = m.plain(m.conv(reflect(y)))
        w = F.relu(m.norm(m.conv(reflect(z)))) + z
    return y, m.conv(reflect(w.float())) + reflect(w)[:, :, 1:-1, 1:-1]


@pytest.mark.parametrize("body", [nested, region_in_the_middle])
@pytest.mark.parametrize("grad", [False, True])
def test_regions_in_parts_of_a_network(body, grad):
    model, x = Net(body), torch.randn(2, 4, 12, 10)
    keeping = Keeping()
    with torch.set_grad_enabled(grad):
        ours = torch.compile(model, backend=keeping, fullgraph=True)(x)
        eager = model(x)
    assert "conv2d.default" in keeping.calls
    for out, reference in zip(ours, eager, strict=True):
        assert (out.dtype, out.stride()) == (reference.dtype, reference.stride())
        assert relative_error(out, reference) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_precision_asked_for_goes_before_autocast(precision):
    model, x, dtype = small_net(), picture(), torch.bfloat16
    compiled = torch.compile(model, backend="styleforge", options={"precision": precision})
    with torch.no_grad():
        out, reference = around(compiled, dtype)(x), around(model, dtype)(x)
        exact = copy.deepcopy(model).double()(x.double())
    assert (out.dtype, out.stride()) == (reference.dtype, reference.stride())
    assert relative_error(out, exact) < relative_error(reference, exact) / 3


def test_calls_inside_and_outside_of_autocast_do_not_meet():
    model, x = small_net(), picture()
    compiled = torch.compile(model, backend="styleforge")
    with torch.no_grad():
        for _ in range(2):
            assert compiled(x).dtype == torch.float32
            assert around(compiled, torch.bfloat16)(x).dtype == torch.bfloat16
            assert around(compiled, torch.float16)(x).dtype == torch.float16


def test_training_under_autocast_with_a_scaler():
    twins = [small_net().train() for _ in range(2)]
    twins[1].load_state_dict(twins[0].state_dict())
    x, target = picture() / 255, torch.rand(1, 3, 24, 20)
    losses: list[list[float]] = []
    for model, run in ((twins[0], twins[0]), (twins[1], torch.compile(twins[1], backend="styleforge"))):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                out = run(x)
                loss = F.mse_loss(out.float(), target)
            scaler.scale(loss).backward()
            assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
            scaler.step(optimizer)
            scaler.update()
            losses[-1].append(float(loss))
        assert scaler.get_scale() == 256.0  # no step was skipped
    assert losses[1][-1] < losses[1][0]
    for eager, ours in zip(*losses, strict=True):
        assert abs(eager - ours) < 0.03 * eager


def test_an_op_computes_in_what_it_is_given_whatever_autocast_says():
    x, weight = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3)
    expected = call(x, weight, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(x, weight, x)
        moved = OPS.normalize.default(x.half(), None, None, None, None, 1.0, "relu", None, False, 2, [1] * 4)
    assert all(map(torch.equal, found, expected)) and moved.dtype == torch.float16


def autocast_on_a_gpu(norm: Any, then: torch.dtype) -> fx.GraphModule:
    """conv, norm and relu, read by a convolution and a sine, in the dtypes that a GPU's autocast gives."""
    graph, half, full = fx.Graph(), torch.float16, torch.float32

    def node(kind: str, dtype: torch.dtype, target: Any, args: Any, shape: tuple[int, ...]) -> Any:
        made = getattr(graph, kind)(target, *([args] if kind == "call_function" else []))
        made.meta["example_value"] = torch.empty(shape, dtype=dtype)
        return made

    x, w, v = (
        node("placeholder", full, name, (), shape)
        for name, shape in (("x", (1, 8, 8, 8)), ("w", (8, 8, 3, 3)), ("v", (8,)))
    )
    small, wide = (1, 8, 8, 8), (1, 8, 10, 10)
    y = node("call_function", full, F.pad, (x, (1, 1, 1, 1), "reflect"), wide)
    y = node("call_function", half, torch.conv2d, (y, w, v), small)
    y = node("call_function", then, norm, (y, 4, v, v) if norm is F.group_norm else (y,), small)
    y = node("call_function", then, F.relu, (y,), small)
    z = node("call_function", then, F.pad, (y, (1, 1, 1, 1), "reflect"), wide)
    z = node("call_function", half, torch.conv2d, (z, w), small)
    graph.output((z, node("call_function", then, torch.sin, (y,), small)))
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize("extra", [True, False])
def test_a_norm_that_autocast_has_in_float32(extra):
    """On a GPU a group norm is one: others read float32 of it, convolutions 16 bits."""
    gm = autocast_on_a_gpu(F.group_norm, torch.float32)
    if not extra:
        (output,) = (node for node in gm.graph.nodes if node.op == "output")
        output.args = ((output.args[0][0],),)
        gm.graph.eliminate_dead_code()
    normalized = normalize(gm)
    decisions = plan(normalized, match(normalized), Options()).decisions
    assert [d.precision for d in decisions] == ["fp16", "fp16"]
    assert [d.finish for d in decisions] == (["here", "none"] if extra else ["deferred", "none"])
    out = rewrite(normalized, plan(normalized, match(normalized), Options()))(
        x := torch.randn(1, 8, 8, 8), w := torch.randn(8, 8, 3, 3), v := torch.randn(8)
    )
    assert [value.dtype for value in out] == [torch.float16, torch.float32][: 1 + extra]
    y = F.conv2d(reflect(x).half(), w.half(), v.half())
    y = F.relu(F.group_norm(y.float(), 4, v, v))
    assert relative_error(out[0], F.conv2d(reflect(y).half(), w.half())) < 2e-3
    if extra:
        assert relative_error(out[1], y.sin()) < 2e-3


def test_an_instance_norm_keeps_autocasts_16_bits_and_is_kept():
    normalized = normalize(autocast_on_a_gpu(F.instance_norm, torch.float16))
    first, second = plan(normalized, match(normalized), Options()).decisions
    assert (first.finish, first.keep, first.outside, second.dtype) == ("deferred", True, (), torch.float16)


# TF32


@pytest.fixture
def switches():
    """PyTorch's switches of TF32, put back afterwards."""
    backends = (torch.backends, torch.backends.cudnn)
    before = [module.fp32_precision for module in backends]
    conv, rnn = torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision
    yield torch.backends
    torch.backends.cudnn.allow_tf32 = True
    for module, value in zip(backends, before, strict=True):
        module.fp32_precision = value
    torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision = conv, rnn


def test_tf32_follows_either_switch(switches):
    assert tf32.allowed("auto")  # PyTorch's default
    for value in (False, True, False):
        switches.cudnn.allow_tf32 = value
        assert tf32.allowed("auto") is value
    switches.cudnn.allow_tf32 = True
    switches.cudnn.conv.fp32_precision = "ieee"  # with which the older switch cannot be read
    with pytest.raises(RuntimeError):
        assert switches.cudnn.allow_tf32 is None
    assert not tf32.allowed("auto")
    switches.cudnn.conv.fp32_precision = "none"
    for module in (switches.cudnn, switches):
        for value in ("tf32", "ieee", "none"):
            module.fp32_precision = value
            assert tf32.allowed("auto") is (value == "tf32")


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32", "fp32"])
def test_a_precision_asked_for_is_no_matter_of_switches(precision, switches):
    for value in ("tf32", "ieee", "none"):
        switches.cudnn.conv.fp32_precision = value
        assert tf32.allowed(precision) is (precision == "tf32")


@pytest.mark.parametrize("value", ["tf32", "ieee", "none"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_switch_is_turned_and_put_back(precision, value, switches):
    switches.cudnn.conv.fp32_precision = value
    wanted = {"tf32": True, "fp32": False}.get(precision, value == "tf32")
    with tf32.switched(precision):
        assert tf32.allowed("auto") is wanted
        with tf32.switched("fp32"):
            assert not tf32.allowed("auto")
    assert switches.cudnn.conv.fp32_precision == value
    with pytest.raises(ZeroDivisionError), tf32.switched(precision):
        raise ZeroDivisionError
    assert switches.cudnn.conv.fp32_precision == value


def test_an_inherited_switch_goes_on_being_inherited(switches):
    switches.cudnn.conv.fp32_precision = "none"
    switches.cudnn.fp32_precision = "tf32"
    with tf32.switched("fp32"):
        assert not tf32.allowed("auto")
    assert tf32.allowed("auto")
    switches.cudnn.fp32_precision = "ieee"
    assert not tf32.allowed("auto")


def test_threads_turn_the_switch_one_after_another(switches):
    switches.cudnn.conv.fp32_precision = "tf32"
    wrong = []

    def work(precision: str) -> None:
        for _ in range(200):
            with tf32.switched(precision):
                if tf32.allowed("auto") is not (precision == "tf32"):
                    wrong.append(precision)

    threads = [threading.Thread(target=work, args=(p,)) for p in ("fp32", "tf32", "fp32")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and switches.cudnn.conv.fp32_precision == "tf32"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_a_convolution_of_a_precision_is_pytorchs(precision, transposed, monkeypatch):
    x, weight, bias = torch.randn(2, 4, 9, 8), torch.randn(4, 4, 3, 3), torch.randn(4)
    told, convolve = [], torch._convolution
    monkeypatch.setattr(torch, "_convolution", lambda *a: (told.append(a[-1]), convolve(*a))[1])
    output_padding = (1, 0) if transposed else (0, 0)
    out = tf32.convolution(x, weight, bias, [2, 1], [1, 0], precision, transposed, output_padding)
    if transposed:
        expected = F.conv_transpose2d(x, weight, bias, (2, 1), (1, 0), output_padding)
    else:
        expected = F.conv2d(x, weight, bias, (2, 1), (1, 0))
    assert torch.equal(out, expected) and told == [precision == "tf32"]


def test_names_are_those_of_the_dtypes_and_options():
    assert (*PRECISIONS, "int8") == options.PRECISIONS
    assert [name_of(dtype) for dtype in DTYPES] == ["fp32", "fp16", "bf16", "fp64"]
    assert [storage(p, torch.float64) for p in PRECISIONS] == [torch.float64, *STORED.values()]
