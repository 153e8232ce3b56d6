import logging

import pytest
import torch
from torch import nn

from sf_compile.models import CheckpointError, TensorFlowTransformNet, TransformerNet, load_checkpoint


@pytest.fixture
def net():
    torch.manual_seed(0)
    return TransformerNet(width=3, blocks=2)


@pytest.fixture
def save(tmp_path):
    def write(content):
        path = tmp_path / "style.pth"
        torch.save(content, path)
        return path

    return write


def same(net, state):
    loaded = net.state_dict()
    return loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)


def failure(path):
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("kind", [TransformerNet, TensorFlowTransformNet])
@pytest.mark.parametrize(("width", "blocks"), [(3, 2), (1, 0), (4, 5)])
def test_kind_width_and_depth_come_from_the_file(save, kind, width, blocks):
    state = kind(width=width, blocks=blocks).state_dict()
    loaded = load_checkpoint(save(state))
    assert type(loaded) is kind
    assert (loaded.width, loaded.blocks, loaded.training) == (width, blocks, False)
    assert same(loaded, state)


def test_half_precision_files_load_as_float32(net, save):
    loaded = load_checkpoint(save(net.half().state_dict()))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert same(loaded, {key: value.float() for key, value in net.state_dict().items()})


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_a_wrapped_state_dict_is_unwrapped(net, save, wrapper):
    assert same(load_checkpoint(save({wrapper: net.state_dict(), "epoch": 3})), net.state_dict())


def test_old_file_format_loads(net, tmp_path):
    path = tmp_path / "old.model"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)
    assert same(load_checkpoint(path), net.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes_are_stripped_and_said(net, save, caplog, prefix):
    path = save({prefix + key: value for key, value in net.state_dict().items()})
    with caplog.at_level(logging.WARNING):
        assert same(load_checkpoint(path), net.state_dict())
    for part in prefix.split(".")[:-1]:
        assert f"stripped the prefix '{part}.'" in caplog.text


def test_stale_running_statistics_are_dropped_and_said(net, save, caplog):
    stale = {"in1.running_mean": torch.zeros(3), "in1.running_var": torch.ones(3)}
    stale |= {"res1.in2.num_batches_tracked": torch.tensor(4)}
    with caplog.at_level(logging.WARNING):
        assert same(load_checkpoint(save({**net.state_dict(), **stale})), net.state_dict())
    assert "dropped 3 unused running statistics" in caplog.text
    for key in stale:
        assert key in caplog.text


def test_a_clean_file_loads_in_silence(net, save, caplog):
    with caplog.at_level(logging.DEBUG, logger="sf_compile"):
        load_checkpoint(save(net.state_dict()))
    assert not caplog.records


def test_a_missing_key_is_named_with_its_shape(net, save):
    state = net.state_dict()
    del state["in3.weight"]
    assert "missing key 'in3.weight', expected with shape (12,)" in failure(save(state))


def test_a_missing_and_an_unexpected_key_are_both_named(net, save):
    state = net.state_dict()
    state["in1.scale"] = state.pop("in1.weight")
    message = failure(save(state))
    assert "'in1.weight'" in message and "'in1.scale'" in message


def test_an_unexpected_key_is_named(net, save):
    state = {**net.state_dict(), "conv4.conv2d.weight": torch.zeros(1), "conv4.conv2d.bias": torch.zeros(1)}
    assert "unexpected key 'conv4.conv2d.weight' and 1 more" in failure(save(state))


def test_a_wrong_shape_is_named_with_what_was_expected(net, save):
    state = {**net.state_dict(), "deconv1.conv2d.weight": torch.zeros(6, 12, 5, 5)}
    message = failure(save(state))
    assert "'deconv1.conv2d.weight' has shape (6, 12, 5, 5), expected (6, 12, 3, 3)" in message


def test_a_first_layer_of_another_shape_is_refused(net, save):
    state = {**net.state_dict(), "conv1.conv2d.weight": torch.zeros(3, 1, 9, 9)}
    assert "expected (width, 3, 9, 9)" in failure(save(state))


def test_a_foreign_network_says_what_it_knows(save):
    message = failure(save(nn.Linear(2, 2).state_dict()))
    assert "'conv1.conv2d.weight' (TransformerNet)" in message
    assert "'c1.conv.weight' (TensorFlowTransformNet)" in message
    assert "found weight, bias" in message


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {}, {"epoch": 3}], ids=str)
def test_a_file_without_a_state_dict_is_refused(save, content):
    assert "expected" in failure(save(content))


def test_a_pickled_module_is_refused_with_the_way_to_save_one(net, save):
    assert "torch.save(model.state_dict(), path)" in failure(save(net))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "No such file" in failure(tmp_path / "absent.pth")
    assert "directory" in failure(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part", [0, 0.02, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(net, tmp_path, zipped, part):
    path = tmp_path / "cut.pth"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    failure(path)


@pytest.mark.parametrize("content", [b"not a checkpoint\n", b"\x89PNG\r\n\x1a\n" + bytes(50), bytes(400)])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "other.bin"
    path.write_bytes(content)
    failure(path)
