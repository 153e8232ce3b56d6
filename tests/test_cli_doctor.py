import os
from types import SimpleNamespace

import pytest
import torch

from sf_compile.cli import doctor, main
from sf_compile.cpu import building
from sf_compile.cuda import cache, compiler

REASON = 'the NVRTC library is missing (not found), so nothing can be compiled. Fix: pip install "nvrtc"'


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without a GPU on which all is well; a test breaks one thing."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "convolution.cu").touch()
    monkeypatch.setattr(compiler, "available", lambda: None)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(compiler, "source_directory", lambda: sources)
    monkeypatch.setattr(building, "source_directory", lambda: sources)
    monkeypatch.setattr(building, "missing", lambda: None)
    monkeypatch.setattr(torch._dynamo, "list_backends", lambda: ["inductor", "styleforge"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(doctor, "_driver_versions", list)
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    return monkeypatch


@pytest.fixture
def gpu(machine):
    """The same machine with one GPU that PyTorch can use."""
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=140 * 2**30)
    machine.setattr(torch.version, "cuda", "13.0")
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "device_count", lambda: 1)
    machine.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    machine.setattr(doctor, "_driver_versions", lambda: ["580.95"])
    return machine


def healthy(capsys):
    code = main(["doctor"])
    out = capsys.readouterr().out
    assert code == 0, out
    assert "FIX" not in out and "fix:" not in out
    return out


def sick(capsys, name, fix):
    code = main(["doctor"])
    out = capsys.readouterr().out
    assert code == 1
    (row,) = [line for line in out.splitlines() if line.startswith("  FIX")]
    assert row[7:].startswith(name)
    assert out.count("fix: ") == 1 and fix in out.partition("fix: ")[2]
    return out


def test_a_machine_without_a_gpu_is_fine(machine, capsys):
    out = healthy(capsys)
    assert "none (not needed: the CPU runs everything)" in out
    assert "cpu  fused C++ kernels around oneDNN's convolutions" in out
    assert "cuda:0" not in out


def test_cpu_kernels_that_cannot_be_built_are_said_and_are_no_fault(machine, capsys):
    machine.setattr(building, "missing", lambda: "there is no ninja. Fix: pip install ninja")
    out = healthy(capsys)
    assert "none (not needed): there is no ninja; for faster ones: pip install ninja" in out
    assert "cpu  fused graph on PyTorch's own kernels" in out


def test_cpu_kernels_that_are_built_are_found(machine, capsys):
    assert "can be built at first use" in healthy(capsys)
    path = building.place()
    path.parent.mkdir(parents=True)
    path.touch()
    assert f"built, {path}" in healthy(capsys)


def test_a_gpu_gets_kernels_for_its_architecture(gpu, capsys):
    out = healthy(capsys)
    assert "NVIDIA H200, capability 9.0, 140 GiB, driver 580.95" in out
    assert "cuda:0  fused kernels, compiled for sm_90a" in out


def test_nvrtc_is_needed_only_with_a_gpu(machine, capsys):
    machine.setattr(compiler, "available", lambda: REASON)
    assert "not needed without a GPU" in healthy(capsys)


def test_a_gpu_without_nvrtc_is_told_the_fix(gpu, capsys):
    gpu.setattr(compiler, "available", lambda: REASON)
    out = sick(capsys, "NVRTC", 'pip install "nvrtc"')
    assert "cuda:0  fused graph on PyTorch's own kernels" in out


def test_a_gpu_that_nvrtc_does_not_know_is_told_the_fix(gpu, capsys):
    def unknown(capability):
        raise compiler.KernelUnavailable("use a newer PyTorch")

    gpu.setattr(compiler, "architecture", unknown)
    assert "cuda:0  fused graph on PyTorch's own kernels" in sick(capsys, "GPU cuda:0", "use a newer PyTorch")


def test_a_gpu_with_a_cpu_build_of_pytorch_is_told_the_fix(machine, capsys):
    machine.setattr(doctor, "_driver_versions", lambda: ["580.95", "580.95"])
    out = sick(capsys, "GPU", "install a CUDA build of PyTorch")
    assert "2 seen by driver 580.95, none usable by PyTorch" in out


def test_a_gpu_hidden_from_pytorch_is_told_the_fix(gpu, capsys):
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    sick(capsys, "GPU", "CUDA_VISIBLE_DEVICES")


def test_an_old_driver_is_told_in_pytorchs_words(gpu, capsys, recwarn):
    import warnings

    def old():
        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    gpu.setattr(torch.cuda, "is_available", old)
    sick(capsys, "GPU", "driver on your system is too old")


def test_an_old_pytorch_is_told_the_fix(machine, capsys):
    machine.setattr(torch, "__version__", "2.9.1+cu128")
    sick(capsys, "PyTorch", 'pip install "torch>=2.11"')


def test_missing_sources_are_told_the_fix(machine, capsys, tmp_path):
    (tmp_path / "csrc" / "convolution.cu").unlink()
    sick(capsys, "kernel sources", "pip install")


def test_a_missing_entry_point_is_told_the_fix(machine, capsys):
    machine.setattr(torch._dynamo, "list_backends", lambda: ["inductor"])
    sick(capsys, "backend 'styleforge'", "pip install")


def test_a_cache_folder_that_cannot_be_made_is_told_the_fix(machine, capsys, tmp_path):
    (tmp_path / "file").touch()
    machine.setenv(cache.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    sick(capsys, "kernel cache", cache.CACHE_VARIABLE)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_an_unwritable_cache_folder_is_told_the_fix(machine, capsys, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    machine.setenv(cache.CACHE_VARIABLE, str(folder))
    sick(capsys, "kernel cache", cache.CACHE_VARIABLE)


def test_the_trial_leaves_nothing_in_the_cache(machine, capsys, tmp_path):
    healthy(capsys)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_demo_extra_is_said_and_is_no_fault(machine, capsys):
    machine.setattr(doctor, "_version", lambda package: None)
    assert 'pip install "sf_compile[demo]"' in healthy(capsys)


def test_a_machine_without_nvidia_smi_has_no_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._driver_versions() == []


@pytest.mark.gpu
def test_this_gpu_is_found():
    _, gpus, findings = doctor.find_gpus()
    assert len(gpus) == torch.cuda.device_count()
    assert findings[0].fix is None
    assert gpus[0].arch is not None
