import json
import sys

import pytest
import torch
from torch import nn

import sf_compile
from sf_compile import models
from sf_compile.cli import CommandError, explain, main


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "tiny.pth"
    torch.save(models.TransformerNet(width=4, blocks=1).state_dict(), path)
    return path


def refused(words, capsys, *parts):
    assert main(["explain", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("styleforge explain: ")
    for part in parts:
        assert part in err


def test_the_report_on_a_checkpoint_is_printed_as_text(weights, capsys):
    assert main(["explain", str(weights), "--size", "16x24", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "conv" in out and "memory on a GPU: " in out
    with pytest.raises(json.JSONDecodeError):
        json.loads(out)


def test_the_report_is_printed_as_json(weights, capsys):
    assert main(["explain", str(weights), "--size", "16", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_the_network_and_the_input_are_as_asked_for(weights, capsys, monkeypatch):
    seen = {}

    class Report:
        def to_dict(self):
            return {"fused": 1}

    def record(model, *inputs, options=None):
        seen.update(model=model, inputs=inputs)
        return Report()

    monkeypatch.setitem(vars(sf_compile), "explain", record)
    words = [str(weights), "--size", "16x24", "--batch", "2", "--dtype", "bfloat16", "--device", "cpu"]
    assert main(["explain", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"fused": 1}
    (x,) = seen["inputs"]
    assert (tuple(x.shape), x.dtype) == ((2, 3, 16, 24), torch.bfloat16)
    assert x.max() > 200 and x.min() >= 0
    assert not seen["model"].training
    assert {parameter.dtype for parameter in seen["model"].parameters()} == {torch.bfloat16}


def test_transformer_net_is_a_target_and_the_same_each_time():
    first, second = (explain.load_target("transformer_net") for _ in range(2))
    assert isinstance(first, models.TransformerNet)
    assert torch.equal(first.conv1.conv2d.weight, second.conv1.conv2d.weight)


def test_a_callable_in_the_current_folder_is_a_target(tmp_path, monkeypatch):
    (tmp_path / "my_networks_for_explain.py").write_text(
        "from torch import nn\n"
        "class Zoo:\n"
        "    small = staticmethod(lambda: nn.Conv2d(3, 3, 1))\n"
        "def number():\n"
        "    return 3\n"
        "built = nn.Conv2d(3, 3, 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert isinstance(explain.load_target("my_networks_for_explain:Zoo.small"), nn.Conv2d)
    for target, message in [
        ("my_networks_for_explain:number", "returned int, expected an nn.Module"),
        ("my_networks_for_explain:absent", "has no absent"),
        ("my_networks_for_explain:built", "expected a class or a function"),
        ("no_such_module_for_explain:x", "cannot import no_such_module_for_explain"),
    ]:
        with pytest.raises(CommandError, match=message):
            explain.load_target(target)


def test_an_unknown_target_is_one_line(capsys):
    refused(["multistyle19"], capsys, "did you mean multistyle-19")
    refused(["absent.pth"], capsys, "no such file")


def test_an_input_that_the_network_rejects_is_one_line(weights, capsys):
    words = [str(weights), "--size", "4", "--device", "cpu"]
    refused(words, capsys, "rejects an input of shape (1, 3, 4, 4)")


def test_a_damaged_checkpoint_is_one_line(weights, capsys):
    weights.write_bytes(weights.read_bytes()[:500])
    refused([str(weights)], capsys, str(weights))


@pytest.mark.parametrize(
    "words", [["--size", "0x4"], ["--size", "4x"], ["--size", "big"], ["--batch", "0"], ["--dtype", "int8"]]
)
def test_impossible_inputs_are_bad_use(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["explain", "transformer_net", *words])
    assert caught.value.code == 2
    assert "error: argument" in capsys.readouterr().err
