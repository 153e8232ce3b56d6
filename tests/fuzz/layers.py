"""The layers that networks are drawn from, in the spellings that people write them in, and near misses.

Each function takes a ``Sketch`` and the name of a tensor, writes statements, and returns the newest name.
"""

from __future__ import annotations

from fuzz.norms import adaptive_norm, norm, written_norm
from fuzz.sketch import Sketch


def pad(s: Sketch, t: str) -> str:
    """Padding of every mode; asymmetric, empty, cropping, or one too large."""
    value = s.value(t)
    n = s.one_of(1, 2, 3, 4)
    sizes = s.one_of((n, n, n, n), (n, n, 0, 0), (0, 1, 0, 1), (1, 2, 3, 0), (0, 0, 0, 0), (n, n))
    if s.one_in(12):
        sizes = s.one_of((1, -1, 1, 1), (value.shape[-1], 0, 0, 0), (0, 0, value.shape[-2] - 1, 0))
    mode = s.one_of("reflect", "reflect", "replicate", "constant", "circular")
    if mode == "circular" and min(sizes) < 0:
        mode = "reflect"  # PyTorch 2.13 returns memory that it never wrote
    if mode == "constant":
        number = s.one_of(0, None, 0.0, 1.5, -1)
        if s.one_in(6):
            sizes = (*sizes, 1, 0) if len(sizes) == 4 else sizes
        if s.one_in(3) and len(sizes) == 4:
            return s.let(f"{s.layer(f'nn.ConstantPad2d({sizes}, {number or 0})')}({t})")
        return s.let(f"F.pad({t}, {sizes}, 'constant', {number})")
    if s.one_in(2) and len(sizes) == 4:
        kind = {"reflect": "Reflection", "replicate": "Replication", "circular": "Circular"}[mode]
        return s.let(f"{s.layer(f'nn.{kind}Pad2d({sizes})')}({t})")
    return s.let(f"F.pad({t}, {sizes}, mode='{mode}')")


def conv(s: Sketch, t: str) -> str:
    """A convolution: dense, strided, grouped, dilated, of even kernels, or called as a function."""
    channels = s.value(t).shape[1]
    kernel = s.one_of(*s.kernels)
    if s.one_in(8):
        kernel = (kernel, s.one_of(*s.kernels))  # type: ignore[assignment]
    out = s.one_of(*s.channels, channels)
    largest = kernel if isinstance(kernel, int) else max(kernel)
    stride = s.one_of(1, 1, 1, 2, 2, 3, (2, 1))
    padding = s.one_of(0, largest // 2, largest // 2, 1, (1, 0), "'same'", "'valid'")
    stride = 1 if padding == "'same'" else stride
    more = ""
    if s.one_in(8):
        more += f", dilation={s.one_of(2, (1, 2))}"
    if s.one_in(8):
        groups = s.one_of(*(g for g in (channels, 2, 1) if channels % g == 0))
        out, more = out * groups if out % groups else out, more + f", groups={groups}"
    mode = s.one_of("zeros", "zeros", "reflect", "replicate", "circular")
    bias = not s.one_in(3)
    if s.one_in(6):
        of_channels = channels if "groups" not in more else channels // int(more.rsplit("=", 1)[1])
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        weight = s.layer(f"nn.Parameter(torch.randn({out}, {of_channels}, {height}, {width}))")
        return s.let(f"F.conv2d({t}, {weight}, stride={stride}, padding={padding}{more})")
    made = s.layer(
        f"nn.Conv2d({channels}, {out}, {kernel}, stride={stride}, padding={padding}, bias={bias}, "
        f"padding_mode='{mode}'{more})"
    )
    return s.let(f"{made}({t})")


def transposed_conv(s: Sketch, t: str) -> str:
    """A transposed convolution; an output padding as large as the stride is refused."""
    channels, out = s.value(t).shape[1], s.one_of(*s.channels)
    kernel, stride = s.one_of(3, 4, 2, 5), s.one_of(2, 1, 3)
    padding, extra = s.one_of(1, 0, 2), s.one_of(0, 1)
    groups = s.one_of(1, 1, 1, 2) if channels % 2 == out % 2 == 0 else 1
    return s.let(
        s.layer(
            f"nn.ConvTranspose2d({channels}, {out}, {kernel}, {stride}, {padding}, output_padding={extra}, "
            f"groups={groups}, bias={not s.one_in(3)})"
        )
        + f"({t})"
    )


def activation(s: Sketch, t: str) -> str:
    """An activation: mostly ReLU, as a layer, function or method, in place or not."""
    if not s.one_in(3):
        return s.let(
            s.one_of(
                f"F.relu({t})", f"torch.relu({t})", f"{t}.relu()", f"F.relu({t}, inplace=True)",
                f"{t}.relu_()", f"{s.layer(f'nn.ReLU(inplace={s.one_in(2)})')}({t})", f"torch.relu_({t})",
            )
        )  # fmt: skip
    inplace = s.one_in(3)
    return s.let(
        s.one_of(
            f"F.leaky_relu({t}, {s.one_of(0.2, 0.01, 0.0)}, {inplace})", f"F.relu6({t}, inplace={inplace})",
            f"F.silu({t}, inplace={inplace})", f"F.gelu({t})", f"F.gelu({t}, approximate='tanh')",
            f"torch.tanh({t})", f"{t}.sigmoid()", f"torch.tanh({t}) * 150 + 127.5", f"{t}.clamp(0, 1)",
            f"torch.clamp({t}, min=0)", f"F.elu({t}, inplace={inplace})", f"F.hardtanh({t})",
            f"{s.layer(f'nn.PReLU({s.one_of(1, s.value(t).shape[1])})')}({t})", f"{t}.clamp_(-1, 1)",
            f"(torch.tanh({t}) + 1) / 2", f"F.softplus({t})", f"F.hardswish({t})", f"torch.maximum({t}, x)",
        )
    )  # fmt: skip


def add(s: Sketch, t: str) -> str:
    """A sum of two tensors in either order, into the first or not, broadcast, scaled or with itself."""
    same = [name for name in s.names if s.value(name).shape == s.value(t).shape]
    other = s.draw_from(same) if not s.one_in(6) else s.pick()
    return s.let(
        s.one_of(
            f"{t} + {other}", f"{other} + {t}", f"torch.add({t}, {other})", f"{t}.add({other})",
            f"{t}.add_({other})", f"{other}.add_({t})", f"torch.add({t}, {other}, alpha=2)", f"{t} + {t}",
            f"{t} + 1", f"{t} + {other}.mean((2, 3), keepdim=True)", f"{t} + 0.5 * {other}",
        )
    )  # fmt: skip


def add_into(s: Sketch, t: str) -> str:
    """``t += other``, which writes into the tensor where there is one, seen through every name of it."""
    same = [name for name in s.names if s.value(name).shape == s.value(t).shape]
    s.run(f"{t} += {s.draw_from(same)}")
    return s.newest


def concatenate(s: Sketch, t: str) -> str:
    """Tensors one after another, over channels as a rule."""
    others = [n for n in s.names if s.value(n).dim() == 4 and s.value(n).shape[2:] == s.value(t).shape[2:]]
    return s.let(f"torch.cat([{t}, {s.draw_from(others)}], {s.one_of(1, 1, 0, 3)})")


def upsample(s: Sketch, t: str) -> str:
    """Upsampling by a factor, a size or a scale that is nearly whole."""
    h, w = s.value(t).shape[2:]
    return s.let(
        s.one_of(
            f"F.interpolate({t}, scale_factor=2)", f"F.interpolate({t}, scale_factor=2.0, mode='nearest')",
            f"{s.layer('nn.Upsample(scale_factor=2)')}({t})", f"F.interpolate({t}, size=({2 * h}, {2 * w}))",
            f"F.interpolate({t}, size=({t}.shape[2] * 2, {t}.shape[3] * 2))",
            f"F.interpolate({t}, scale_factor=3)",
            f"F.interpolate({t}, scale_factor=2.05)", f"F.interpolate({t}, size=({2 * h + 1}, {2 * w}))",
            f"F.interpolate({t}, scale_factor=(2, 3))", f"F.interpolate({t}, scale_factor=0.5)",
            f"F.interpolate({t}, scale_factor=2, mode='bilinear', align_corners={s.one_in(2)})",
            f"F.interpolate({t}, scale_factor=2, mode='nearest-exact')",
            f"F.interpolate({t}, scale_factor=2.0, recompute_scale_factor=True)",
            f"{t}.repeat_interleave(2, 2).repeat_interleave(2, 3)", f"F.interpolate({t}, scale_factor=1)",
        )
    )  # fmt: skip


def shuffle(s: Sketch, t: str) -> str:
    """Channels to pixels, or pixels to channels."""
    kinds = ["F.pixel_shuffle({}, 2)"] * (s.value(t).shape[1] % 4 == 0) + ["F.pixel_unshuffle({}, 2)"]
    return s.let(s.one_of(*kinds).format(t))


def view(s: Sketch, t: str) -> str:
    """A view or copy of a tensor in another shape or layout."""
    h, w = s.value(t).shape[2:]
    return s.let(
        s.one_of(
            f"{t}.transpose(2, 3)", f"{t}[:, :, 1:, :-1]", f"{t}[..., ::2]", f"{t}.flip(3)",
            f"{t}.contiguous()",
            f"{t}.contiguous(memory_format=torch.channels_last)", f"{t}[:1]", f"{t}.clone()", f"{t}.detach()",
            f"{t}.permute(0, 1, 3, 2)", f"{t}.reshape({t}.shape[0], {t}.shape[1], {w}, {h})",
            f"{t}.view_as({t})",
            f"{t}[:, :2]", f"{t}.to({t}.dtype)", f"{t}.expand(-1, -1, -1, -1)",
            f"{t}.narrow(2, 0, {max(h - 1, 1)})",
        )
    )  # fmt: skip


def write(s: Sketch, t: str) -> str:
    """A write into a tensor that others may have read, or may be views of."""
    s.run(
        s.one_of(
            f"{t}.mul_(2)", f"{t}[..., 0] = 1", f"{t}[:, :1].zero_()", f"{t} *= 0.5", f"{t}.add_(1)",
            f"{t}.copy_({t}.flip(3))", f"torch.clamp({t}, -1, 1, out={t})", f"{t}.clamp_(min=0)",
        )
    )  # fmt: skip
    return s.newest


def unknown(s: Sketch, t: str) -> str:
    """An operation that no rule is about."""
    return s.let(
        s.one_of(
            f"torch.sin({t})", f"F.avg_pool2d({t}, 2)", f"F.softmax({t}, 1)", f"{t}.sort(3)[0]", f"{t} * 2",
            f"F.max_pool2d({t}, 2)", f"{t} - {t}.mean()", f"{t} * torch.sigmoid({t})", f"{t}.abs()", f"-{t}",
            f"F.dropout({t}, 0.5, training=False)", f"{s.layer('nn.Identity()')}({t})", f"{t} / {t}.shape[3]",
            f"{t}.amax(1, keepdim=True) + {t}", f"F.adaptive_avg_pool2d({t}, 1) * {t}",
        )
    )  # fmt: skip


def mode_switch(s: Sketch, t: str) -> str:
    """A layer or two under another grad mode or autocast, or a graph break."""
    if s.one_in(4):
        s.run("torch._dynamo.graph_break()")
        return s.newest
    guard = s.one_of(
        "torch.no_grad()", "torch.enable_grad()", "torch.autocast({t}.device.type, dtype=torch.bfloat16)",
        "torch.autocast({t}.device.type, enabled=False)",
    ).format(t=t)  # fmt: skip
    start = len(s.statements)
    s.one_of(conv, norm, activation)(s, t)
    for number in range(start, len(s.statements)):
        # Each is its own region: what was drawn has run without, so its shapes stay as they are.
        s.statements[number] = f"with {guard}:\n    {s.statements[number]}"
    return s.newest


def block(s: Sketch, t: str) -> str:
    """What a style network is made of: [upsample] [pad] conv [norm] [activation] [add]."""
    skip = t
    if s.one_in(4):
        t = upsample(s, t)
    if not s.one_in(3):
        t = pad(s, t)
    t = conv(s, t)
    if not s.one_in(4):
        t = s.one_of(norm, norm, norm, written_norm)(s, t)
    if not s.one_in(3):
        t = activation(s, t)
    if s.one_in(3):
        t = add(s, t)
    elif s.one_in(3) and s.value(skip).shape == s.value(t).shape:
        t = s.let(f"{skip} + {t}")
    return t


def residual_blocks(s: Sketch, t: str) -> str:
    """Two residual blocks or more of 3 x 3 convolutions, as one loop of a network would make them."""
    c = s.value(t).shape[1]
    pad_mode, second_relu = s.one_of("reflect", "reflect", "replicate"), s.one_in(6)
    for _ in range(s.one_of(2, 1, 3)):
        skip = t
        for last in (False, True):
            made = s.layer(f"nn.Conv2d({c}, {c}, 3, bias={not s.one_in(3)})")
            t = s.let(f"{made}(F.pad({t}, (1, 1, 1, 1), mode='{pad_mode}'))")
            t = s.let(f"{s.layer(f'nn.InstanceNorm2d({c}, affine=True)')}({t})")
            if not last or second_relu:
                t = activation(s, t)
        t = s.let(f"{t} + {skip}")
    return t


PICTURES = (
    block, block, block, block, block, block, conv, pad, norm, activation, add, residual_blocks, upsample,
    concatenate, add_into, view, write, unknown, written_norm, transposed_conv, shuffle, mode_switch,
    adaptive_norm,
)  # fmt: skip
"""What may follow a tensor of four dimensions, the likelier more often."""
