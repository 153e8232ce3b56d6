"""Rules about imports, in the source and in a fresh interpreter, and what a wheel holds."""

import ast
import configparser
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sf_compile

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sf_compile"
STAGES = ("normalize", "match", "plan", "rewrite", "trunks", "regions")
IMPORT_MS = 50


def imports(path):
    """Every sf_compile module that a source file names in an import, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import hides what is imported"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in names if name and name.split(".")[0] == "sf_compile"}


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {name_of(path): imports(path) for path in sorted(PACKAGE.rglob("*.py"))}
PARTS = {
    "sf_compile.graph": ("sf_compile.ops", "sf_compile.cuda", "sf_compile.backend", "sf_compile.report"),
    "sf_compile.ops": ("sf_compile.graph", "sf_compile.options", "sf_compile.backend", "sf_compile.report"),
    "sf_compile.cuda": ("sf_compile.graph", "sf_compile.options", "sf_compile.backend", "sf_compile.report"),
    "sf_compile.runtime": (
        "sf_compile.graph",
        "sf_compile.options",
        "sf_compile.backend",
        "sf_compile.report",
    ),
    "sf_compile.cpu": ("sf_compile.graph", "sf_compile.options", "sf_compile.backend", "sf_compile.report"),
    "sf_compile.models": ("sf_compile.graph", "sf_compile.ops", "sf_compile.cuda", "sf_compile.backend"),
    "sf_compile.options": ("sf_compile.",),
    "sf_compile.pipeline": ("sf_compile.graph", "sf_compile.cuda", "sf_compile.backend", "sf_compile.cli"),
    "sf_compile.backend": ("sf_compile.cuda", "sf_compile.report", "sf_compile.cli", "sf_compile.models"),
}


def within(name, part):
    return name == part or name.startswith(part.rstrip(".") + ".")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_imports_nothing_above_or_beside_it(part):
    modules = {name: found for name, found in SOURCES.items() if within(name, part)}
    assert modules
    for name, found in modules.items():
        forbidden = {other for other in found for above in PARTS[part] if within(other, above)}
        assert not forbidden, f"{name} imports {sorted(forbidden)}"


def test_only_the_backend_sees_every_stage():
    stages = {f"sf_compile.graph.{stage}" for stage in STAGES}
    assert stages <= SOURCES.keys()
    assert [name for name, found in SOURCES.items() if stages <= found] == ["sf_compile.backend"]
    inside = {"sf_compile.backend", "sf_compile.report", "sf_compile.export"}
    for name, found in SOURCES.items():
        if not within(name, "sf_compile.graph") and name not in inside:
            assert not {other for other in found if within(other, "sf_compile.graph")}, name


@pytest.mark.parametrize("index", range(len(STAGES)), ids=STAGES)
def test_a_stage_imports_only_earlier_ones(index):
    later = {f"sf_compile.graph.{stage}" for stage in STAGES[index + 1 :]}
    assert not SOURCES[f"sf_compile.graph.{STAGES[index]}"] & later


def run(code, cwd, *paths, **environment):
    """Standard output and error of a fresh interpreter that runs ``code``."""
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_importing_the_package_loads_nothing_heavy_and_touches_no_gpu(tmp_path):
    code = """
import sys, torch
before = set(sys.modules)
import sf_compile
print(torch.cuda.is_initialized(), sorted(set(sys.modules) - before))
sf_compile.Options, sf_compile.explain, sf_compile.Report, sf_compile.models
kernels = ("sf_compile.ops", "sf_compile.cuda")
print(torch.cuda.is_initialized(), [name for name in sys.modules if name.startswith(kernels)])
"""
    first, second = run(code, tmp_path, ROOT)[0].splitlines()
    assert first == "False ['sf_compile']"
    assert second == "False []"


def test_the_package_runs_as_the_command(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def run_command(word):
        command = [sys.executable, "-m", "sf_compile", word]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    asked, refused = run_command("--version"), run_command("nonsense")
    assert asked.returncode == 0 and asked.stdout.strip() == f"styleforge {sf_compile.__version__}"
    assert refused.returncode == 2 and "usage: styleforge" in refused.stderr


def test_importing_the_package_is_quick(tmp_path):
    code = """
import time, torch
start = time.perf_counter()
import sf_compile
print((time.perf_counter() - start) * 1e3)
"""
    times = []
    while len(times) < 3 and not any(ms < IMPORT_MS for ms in times):
        times.append(float(run(code, tmp_path, ROOT)[0]))
    assert min(times) < IMPORT_MS


def test_an_unknown_attribute_is_an_attribute_error(tmp_path):
    import sf_compile

    with pytest.raises(AttributeError, match="module 'sf_compile' has no attribute 'explian'"):
        sf_compile.explian  # noqa: B018
    assert all(getattr(sf_compile, name) is not None for name in sf_compile.__all__)


def test_torch_logs_shows_each_match_and_each_refusal(tmp_path):
    code = """
import torch
from torch import nn
from sf_compile.backend import styleforge
pad = nn.ReflectionPad2d(1)
net = nn.Sequential(pad, nn.Conv2d(3, 4, 3), nn.ReLU(), pad, nn.Conv2d(4, 4, 3, groups=2))
torch.compile(net, backend=styleforge)(torch.rand(1, 3, 8, 8))
"""
    _, error = run(code, tmp_path, ROOT, TORCH_LOGS="+sf_compile")
    lines = [line for line in error.splitlines() if "sf_compile/" in line]
    assert any("match: pad+conv+relu[" in line for line in lines)
    assert any("left alone: " in line and "grouped convolution (groups=2)" in line for line in lines)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("building a wheel needs hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    run(f"from hatchling.build import build_wheel; build_wheel({str(folder)!r})", ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_the_package_the_kernels_and_the_entry_points(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (points,) = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
        text = archive.read(points).decode()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        described = archive.read(metadata).decode()
    kernels = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".cpp", ".h")]
    assert {path.suffix for path in kernels} == {".cu", ".cuh", ".cpp", ".h"}
    assert {f"sf_compile/{path.relative_to(ROOT)}" for path in kernels} <= names
    assert {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")} <= names
    assert not [name for name in names if "tests" in name or name.endswith((".pyc", ".pth", ".pt", ".png"))]
    parser = configparser.ConfigParser()
    parser.read_string(text)
    assert dict(parser["torch_dynamo_backends"]) == {"styleforge": "sf_compile.backend:styleforge"}
    assert dict(parser["console_scripts"]) == {"styleforge": "sf_compile.cli:main"}
    assert "Requires-Python: >=3.10" in described


def test_an_installed_package_finds_its_kernels(unpacked, tmp_path):
    code = """
import sf_compile
from sf_compile.cuda.compiler import source_directory
print(sf_compile.__file__)
print(source_directory())
print(*sorted(path.name for path in source_directory().iterdir()))
"""
    file, directory, names = run(code, tmp_path, unpacked)[0].splitlines()
    assert Path(file) == unpacked / "sf_compile" / "__init__.py"
    assert Path(directory) == unpacked / "sf_compile" / "csrc"
    assert {path.name for path in (ROOT / "csrc").glob("*.cu*")} <= set(names.split())


def test_an_installed_backend_is_found_by_its_name(unpacked, tmp_path):
    code = """
import sys, torch
from torch import nn
net = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.ReLU()).eval()
x = torch.rand(1, 3, 9, 8)
assert "styleforge" in torch.compiler.list_backends()
out = torch.compile(net, backend="styleforge", options={"layout": "contiguous"})(x)
assert torch.allclose(out, net(x), atol=1e-5) and out.grad_fn is not None
assert "sf_compile.ops" in sys.modules
print(sys.modules["sf_compile"].__file__)
"""
    assert Path(run(code, tmp_path, unpacked)[0]).parents[1] == unpacked
