"""The strategy: whole networks of hypothesis's choice."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from fuzz.layers import PICTURES
from fuzz.programs import LAYOUTS, Program
from fuzz.sketch import Sketch

# A GPU's are few: channels and kernels are constants of the fused convolutions, each compiled for a second.
CHANNELS = {"cpu": (4, 3, 8, 1, 5, 2), "cuda": (32, 16, 32, 3, 16, 5)}
KERNELS = {"cpu": (3, 1, 3, 5, 3, 2, 7, 4, 9, 6), "cuda": (3, 3, 1, 3, 9, 4)}
DTYPES = {
    "cpu": ("float32", "float32", "float32", "float32", "float64", "bfloat16"),
    "cuda": ("float16", "float32", "float16", "bfloat16", "float32", "float64"),
}
SIDES = {"cpu": (12, 9, 16, 7, 5, 3, 1), "cuda": (32, 37, 32, 48, 5)}


@st.composite
def programs(draw: Any, device: str = "cpu", most_layers: int = 6) -> Program:
    """Networks of one to ``most_layers`` layers (a block of several operations is one) on ``device``."""
    batch = draw(st.sampled_from((1, 2, 1, 3)))
    sides = st.sampled_from(SIDES[device])
    size = (batch, draw(st.sampled_from(CHANNELS[device])), draw(sides), draw(sides))
    training = draw(st.sampled_from((False, False, True)))
    dtype = draw(st.sampled_from(DTYPES[device]))
    # The drawing itself runs on the CPU, in a dtype that every operation there has.
    x = torch.randn(size, dtype=torch.float64 if dtype == "float64" else torch.float32)
    s = Sketch(draw, x, training, CHANNELS[device], KERNELS[device], refusals=draw(st.integers(0, 9)) == 9)
    for _ in range(draw(st.integers(1, most_layers))):
        if s.refused:
            break
        s.draw_from(PICTURES)(s, s.pick(4))
    results = [s.newest]
    if s.one_in(4):
        results.append(s.draw_from(s.names))
    sizes = [size]
    if s.one_in(4):
        sizes.append(
            (s.one_of(batch, 1, 2), size[1], size[2] + s.one_of(0, 2, 8), size[3] + s.one_of(4, 0, 3))
        )
    return Program(
        modules=s.called_modules,
        statements=tuple(s.statements),
        results=tuple(results),
        sizes=tuple(sizes),
        dtype=dtype,
        layout=s.one_of("contiguous", "contiguous", *LAYOUTS),
        network_format=s.one_of("", "", "", "channels_last"),
        training=training,
        grad=s.one_of("no_grad", "no_grad", "enable_grad", "inference_mode"),
        input_grad=s.one_in(2),
        input_reused=s.one_in(2),
        dynamic=s.one_of(None, None, None, False, True),
        inner_layout=s.one_of("auto", "auto", "auto", "channels_last", "contiguous"),
        fallback=s.one_of("eager", "eager", "eager", "eager", "eager", "eager", "aot_eager"),
        device=device,
        seed=draw(st.integers(0, 3)),
    )
