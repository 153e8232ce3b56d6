from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from torch import nn

import sf_compile
from sf_compile.backend import styleforge
from sf_compile.options import LAYOUTS, MODES, Options


def a_backend(gm, example_inputs):
    return gm.forward


def test_defaults():
    options = Options()
    assert (options.fallback, options.layout, options.mode) == ("eager", "auto", "default")
    assert Options.build() == Options.build({}) == Options.build(None, None) == options


def test_options_are_frozen_and_compare_by_value():
    options = Options(layout="contiguous")
    with pytest.raises(FrozenInstanceError):
        options.layout = "auto"
    assert options == Options.build({"layout": "contiguous"})
    assert hash(options) == hash(Options(layout="contiguous"))
    assert options != Options()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_torch_compile_is_taken_either_way(mode):
    assert Options.build(mode=mode).mode == mode
    assert Options.build({"mode": mode}).mode == mode


@pytest.mark.parametrize(
    ("settings", "captures"),
    [
        ({}, False),
        ({"cuda_graphs": True}, True),
        ({"mode": "reduce-overhead"}, True),
        ({"mode": "max-autotune"}, True),
        ({"mode": "max-autotune-no-cudagraphs"}, False),
        ({"mode": "max-autotune-no-cudagraphs", "cuda_graphs": True}, True),
        ({"mode": "reduce-overhead", "cuda_graphs": False}, False),
        ({"mode": "reduce-overhead", "fallback": "inductor"}, False),  # Inductor's own
        ({"mode": "reduce-overhead", "fallback": a_backend}, False),
    ],
)
def test_a_mode_means_graphs_as_it_does_for_inductor(settings, captures):
    assert Options.build(settings).captures is captures


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_taken(layout):
    assert Options.build({"layout": layout}).layout == layout


@pytest.mark.parametrize("fallback", ["eager", "inductor", a_backend])
def test_every_kind_of_fallback_is_taken(fallback):
    assert Options.build({"fallback": fallback}).fallback is fallback


def test_a_finished_options_object_is_taken_as_it_is():
    options = Options(layout="contiguous", mode="max-autotune")
    assert Options.build(options) is options


KEYS = ", ".join(field.name for field in fields(Options))
MODE_NAMES = ", ".join(MODES)
WRONG = [
    ({"layuot": "auto"}, f"unknown option 'layuot'; did you mean 'layout'? Valid: {KEYS}"),
    ({"fall_back": "eager"}, f"unknown option 'fall_back'; did you mean 'fallback'? Valid: {KEYS}"),
    ({"Mode": "default"}, f"unknown option 'Mode'; did you mean 'mode'? Valid: {KEYS}"),
    ({"zzz": 1}, f"unknown option 'zzz'; valid: {KEYS}"),
    ({7: 1}, f"unknown option 7; valid: {KEYS}"),
    (
        {"fallback": "inducter"},
        "fallback cannot be 'inducter'; did you mean 'inductor'? Valid: eager, inductor or a callable",
    ),
    ({"fallback": "xyz"}, "fallback cannot be 'xyz'; valid: eager, inductor or a callable"),
    ({"fallback": 3}, "fallback cannot be 3 (int); valid: eager, inductor or a callable"),
    ({"fallback": None}, "fallback cannot be None (NoneType); valid: eager, inductor or a callable"),
    (
        {"layout": "channel_last"},
        "layout cannot be 'channel_last'; did you mean 'channels_last'? "
        "Valid: auto, channels_last, contiguous",
    ),
    ({"layout": True}, "layout cannot be True (bool); valid: auto, channels_last, contiguous"),
    ({"layout": ["auto"]}, "layout cannot be ['auto'] (list); did you mean 'auto'? Valid: "),
    (
        {"mode": "max-autotun"},
        f"mode cannot be 'max-autotun'; did you mean 'max-autotune'? Valid: {MODE_NAMES}",
    ),
    ({"mode": "fast"}, "mode cannot be 'fast'; "),
    ({"cuda_graph": True}, f"unknown option 'cuda_graph'; did you mean 'cuda_graphs'? Valid: {KEYS}"),
    ({"cuda_graphs": 1}, "cuda_graphs is True, False or None, not 1"),
    ({"cuda_graphs": "yes"}, "cuda_graphs is True, False or None, not 'yes'"),
    ({"cuda_graphs": True, "fallback": "inductor"}, "cuda_graphs=True is for fallback='eager'; Inductor "),
    ({"cuda_graphs": True, "fallback": a_backend}, "cuda_graphs=True is for fallback='eager'; "),
    ({"cuda_graphs_limit": 0}, "cuda_graphs_limit is a number of graphs, 1 or more, not 0"),
    ({"cuda_graphs_limit": True}, "cuda_graphs_limit is a number of graphs, 1 or more, not True"),
    ({"cuda_graphs_memory": 1.5}, "cuda_graphs_memory is a share of the GPU's memory, above 0 and up to 1"),
    ({"cuda_graphs_memory": 0}, "cuda_graphs_memory is a share of the GPU's memory, above 0 and up to 1"),
    ({"mode": None}, "mode cannot be None (NoneType); "),
    ({"precision": "int4"}, "precision cannot be 'int4'; did you mean 'int8'? Valid: "),
    ({"precision": "int8", "fallback": "inductor"}, "precision='int8' is for fallback='eager': its scales "),
    ({"precision": "int8", "fallback": a_backend}, "precision='int8' is for fallback='eager': "),
    ({"min_psnr": -1}, "min_psnr is a number of dB, 0 or more, not -1"),
    ({"min_psnr": float("nan")}, "min_psnr is a number of dB, 0 or more, not nan"),
    ({"min_psnr": float("inf")}, "min_psnr is a number of dB, 0 or more, not inf"),
    ({"min_psnr": True}, "min_psnr is a number of dB, 0 or more, not True"),
    ({"min_psnr": "38"}, "min_psnr is a number of dB, 0 or more, not '38'"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[str(settings) for settings, _ in WRONG])
def test_a_wrong_key_type_or_value_is_named_with_the_nearest_right_one(settings, message):
    with pytest.raises(ValueError) as error:
        Options.build(settings)
    assert f"styleforge: {message}" in str(error.value)


@pytest.mark.parametrize(
    ("options", "mode", "message"),
    [
        ({"mode": "default"}, "default", "mode is given twice, in options and as mode="),
        (Options(), "default", "give the mode inside Options(mode=...) or as mode=, not both"),
        (["layout"], None, "options must be a dict or sf_compile.Options, got list"),
        ("layout", None, "options must be a dict or sf_compile.Options, got str"),
        (None, "reduce-overhea", "did you mean 'reduce-overhead'?"),
    ],
)
def test_a_wrong_call_is_refused(options, mode, message):
    with pytest.raises(ValueError) as error:
        Options.build(options, mode)
    assert message in str(error.value)


def test_the_planner_sees_int8_as_fp16():
    int8 = Options(precision="int8", min_psnr=40)
    assert int8.planned == Options(precision="fp16", min_psnr=40)
    assert all(options.planned is options for options in (Options(), Options(precision="bf16")))
    with pytest.raises(ValueError, match="'fp16' can be saved"):
        int8.check_saved()
    Options(precision="fp16").check_saved()


def test_the_constructor_and_replace_check_too():
    with pytest.raises(ValueError, match="did you mean 'contiguous'"):
        Options(layout="contigous")
    with pytest.raises(ValueError, match="did you mean 'default'"):
        replace(Options(), mode="defualt")


def test_the_user_sees_the_message_through_torch_compile():
    compiled = torch.compile(nn.ReLU(), backend=styleforge, options={"layuot": "auto"})
    with pytest.raises(Exception) as error:
        compiled(torch.zeros(2))
    assert "did you mean 'layout'?" in str(error.value)
    cause = getattr(error.value, "inner_exception", error.value)
    assert isinstance(cause, ValueError)


@pytest.mark.parametrize("mode", MODES)
def test_torch_compile_passes_its_mode(mode):
    model = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3)).eval()
    x = torch.rand(1, 3, 9, 8)
    assert torch.allclose(torch.compile(model, backend=styleforge, mode=mode)(x), model(x), atol=1e-6)


def test_explain_checks_its_options():
    with pytest.raises(ValueError, match="did you mean 'layout'"):
        sf_compile.explain(nn.ReLU(), torch.zeros(1), options={"layot": "auto"})
