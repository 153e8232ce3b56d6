"""sf_compile: a torch.compile backend for style-transfer and other instance-norm image networks.

Users need no import: ``torch.compile(model, backend="styleforge")`` finds the backend through its
entry point. What is exported here is for people who want to look inside. Importing the package
compiles nothing and touches no GPU; the heavier modules load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Options", "Report", "__version__", "compile", "explain", "models", "nn", "pipeline"]

if TYPE_CHECKING:
    from sf_compile import models, nn, pipeline
    from sf_compile.export import compile
    from sf_compile.options import Options
    from sf_compile.report import Report, explain

_HOME = {
    "Options": "sf_compile.options",
    "Report": "sf_compile.report",
    "compile": "sf_compile.export",
    "explain": "sf_compile.report",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in ("models", "nn", "pipeline"):
        return importlib.import_module(f"sf_compile.{name}")
    raise AttributeError(f"module 'sf_compile' has no attribute {name!r}")
