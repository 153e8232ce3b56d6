"""Norms, by PyTorch or by hand; like ``layers``, and used there."""

from __future__ import annotations

from fuzz.sketch import Sketch


def norm(s: Sketch, t: str) -> str:
    """A norm of PyTorch: of instances, batches, groups or layers, with its own or running statistics."""
    c, h, w = s.value(t).shape[1:]
    groups = s.one_of(*(g for g in (1, 2, c) if c % g == 0))
    affine, track, eps = s.one_of(True, False), s.one_in(3), s.one_of(1e-5, 1e-3, 0.1)
    constructor = s.one_of(
        f"nn.InstanceNorm2d({c}, affine={affine}, track_running_stats={track}, eps={eps})",
        f"nn.InstanceNorm2d({c}, affine={affine}, track_running_stats={track}, eps={eps})",
        "",
        f"nn.BatchNorm2d({c}, affine={affine}, track_running_stats={not track}, eps={eps})",
        f"nn.GroupNorm({groups}, {c}, affine={affine})",
        f"nn.LayerNorm([{c}, {h}, {w}])",
    )
    if constructor:
        return s.let(f"{s.layer(constructor)}({t})")
    weight, bias = (s.layer(f"nn.Parameter(torch.ones({c}))") for _ in range(2))
    return s.let(
        s.one_of(
            f"F.instance_norm({t}, eps={eps})",
            f"F.instance_norm({t}, weight={weight}, bias={bias})",
            f"F.instance_norm({t}, weight={weight})",
            f"F.group_norm({t}, {groups}, {weight}, {bias})",
            f"F.layer_norm({t}, [{w}])",
        )
    )


def written_norm(s: Sketch, t: str) -> str:
    """An instance norm by hand, in several ways; over other axes or of another tensor: a near miss."""
    n, c = s.value(t).shape[:2]
    axes = s.one_of("(2, 3)", "(2, 3)", "[-2, -1]", "(-1, -2)", "(1, 2)", "(0, 2, 3)", "(1, 2, 3)")
    of = s.pick(4) if s.one_in(8) else t
    unbiased, eps = s.one_of(False, False, True), s.one_of(1e-5, 1e-3)
    mean = f"{of}.mean({axes}, keepdim=True)"
    variance = s.one_of(
        f"{of}.var({axes}, keepdim=True, unbiased={unbiased})",
        f"torch.var({of}, dim={axes}, keepdim=True, correction={int(unbiased)})",
        f"({of} - {mean}).pow(2).mean({axes}, keepdim=True)",
        f"torch.var_mean({of}, dim={axes}, keepdim=True, unbiased={unbiased})[0]",
    )
    if s.one_in(6):
        variance = f"{of}.view({n}, {c}, -1).var(2, unbiased={unbiased}).view({n}, {c}, 1, 1)"
        mean = f"{of}.view({n}, {c}, -1).mean(2).view({n}, {c}, 1, 1)"
    m, v = s.let(mean), s.let(variance)
    t = s.let(
        s.one_of(
            f"({t} - {m}) / torch.sqrt({v} + {eps})",
            f"({t} - {m}) * torch.rsqrt({v} + {eps})",
            f"({t} - {m}) / ({v}.sqrt() + {eps})",
            f"({t} - {m}) / ({v} + {eps}) ** 0.5",
            f"({t} - {m}).div_(({v} + {eps}).sqrt())",
        )
    )
    if s.one_in(2):
        shape = s.one_of(f"{c}, 1, 1", f"1, {c}, 1, 1", f"{n}, {c}, 1, 1", "1")
        weight, bias = (s.layer(f"nn.Parameter(torch.ones({shape}))") for _ in range(2))
        t = s.let(s.one_of(f"{t} * {weight} + {bias}", f"{weight} * {t} + {bias}", f"{t} * {weight}"))
    return t


def adaptive_norm(s: Sketch, t: str) -> str:
    """AdaIN: one picture's norm with another's mean and deviation, a weight and bias for each image."""
    style = s.pick(4)
    m, d = s.let(f"{style}.mean((2, 3), keepdim=True)"), s.let(f"{style}.std((2, 3), keepdim=True)")
    return s.let(f"F.instance_norm({t}) * {d} + {m}")
