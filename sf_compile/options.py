"""``Options``: what a user may say in ``torch.compile(..., options={...}, mode=...)``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

FALLBACKS = ("eager", "inductor")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
LAYOUTS = ("auto", "channels_last", "contiguous")
PRECISIONS = ("auto", "fp16", "bf16", "tf32", "fp32", "int8")
CAPTURING_MODES = ("reduce-overhead", "max-autotune")
"""The modes that mean CUDA graphs, as they do for Inductor."""


@dataclass(frozen=True)
class Options:
    """Settings of the styleforge backend; the defaults suit everybody.

    Attributes:
        fallback: What runs the nodes that are not replaced: ``"eager"``, ``"inductor"``, or any
            callable ``(GraphModule, example_inputs) -> callable``, as torch.compile backends are.
        layout: Memory layout of the tensors that never leave a fused region: ``"auto"`` (by device
            and dtype), ``"channels_last"`` (on a GPU, other TF32 algorithms of cuDNN than eager's) or
            ``"contiguous"``. What a model returns always has the strides that eager PyTorch gives it.
        precision: What the fused convolutions compute in: ``"auto"`` (as the model, PyTorch's switches of
            TF32 and autocast say), ``"fp16"``, ``"bf16"``, ``"tf32"`` or ``"fp32"``, from a model of any
            dtype. Sums and statistics are float32, parameters stay as they are, and so does the dtype
            of what a model returns. ``"int8"`` is ``"fp16"`` but for convolutions between two instance norms,
            which multiply 8-bit integers where the picture stays as good as ``min_psnr`` asks. For
            ``fallback="eager"`` alone.
        min_psnr: Of ``precision="int8"``: how close, in dB, the picture must come to the one of ``"fp16"``;
            the peak is the range of that picture's numbers. It is measured in the first call, whose picture
            also settles the integers' scales. Layers that cost most go back to float16 until it is reached.
        mode: One of torch.compile's four modes. The fused ops run alike in all of them; those of
            ``CAPTURING_MODES`` run them in CUDA graphs. With ``fallback="inductor"`` the mode is Inductor's,
            and so are its graphs.
        cuda_graphs: Whether a call that comes again is captured in a CUDA graph and replayed; None leaves it
            to ``mode``. For ``fallback="eager"`` alone: another fallback sees to graphs itself.
        cuda_graphs_limit: How many graphs one compiled graph keeps; the least recently used go first.
        cuda_graphs_memory: The share of the GPU's memory that they may hold together.

    Raises:
        ValueError: for a value that is none of these; the message names the nearest valid one.
    """

    fallback: str | Callable[..., Any] = "eager"
    layout: str = "auto"
    precision: str = "auto"
    mode: str = "default"
    cuda_graphs: bool | None = None
    cuda_graphs_limit: int = 8
    cuda_graphs_memory: float = 0.25
    min_psnr: float = 38.0

    def __post_init__(self) -> None:
        if not callable(self.fallback):
            _check_choice("fallback", self.fallback, FALLBACKS, "or a callable")
        _check_choice("layout", self.layout, LAYOUTS)
        _check_choice("precision", self.precision, PRECISIONS)
        _check_choice("mode", self.mode, MODES)
        self._check_cuda_graphs()
        self._check_int8()

    @property
    def planned(self) -> Options:
        """These options as the planner sees them: what multiplies integers is settled by a call."""
        return replace(self, precision="fp16") if self.precision == "int8" else self

    @property
    def captures(self) -> bool:
        """Whether calls are captured in CUDA graphs of ours."""
        wanted = self.mode in CAPTURING_MODES if self.cuda_graphs is None else self.cuda_graphs
        return wanted and self.fallback == "eager"

    def _check_cuda_graphs(self) -> None:
        if self.cuda_graphs is not None and type(self.cuda_graphs) is not bool:
            raise ValueError(f"styleforge: cuda_graphs is True, False or None, not {self.cuda_graphs!r}")
        if self.cuda_graphs and self.fallback != "eager":
            raise ValueError(
                "styleforge: cuda_graphs=True is for fallback='eager'; Inductor captures graphs of its own "
                "by mode='reduce-overhead', and a callable may do as it likes"
            )
        limit, share = self.cuda_graphs_limit, self.cuda_graphs_memory
        if type(limit) is not int or limit < 1:
            raise ValueError(f"styleforge: cuda_graphs_limit is a number of graphs, 1 or more, not {limit!r}")
        if type(share) not in (int, float) or not 0 < share <= 1:
            raise ValueError(
                f"styleforge: cuda_graphs_memory is a share of the GPU's memory, above 0 and up to 1, "
                f"not {share!r}"
            )

    def _check_int8(self) -> None:
        if type(self.min_psnr) not in (int, float) or not 0 <= self.min_psnr < math.inf:
            raise ValueError(f"styleforge: min_psnr is a number of dB, 0 or more, not {self.min_psnr!r}")
        if self.precision == "int8" and self.fallback != "eager":
            raise ValueError(
                "styleforge: precision='int8' is for fallback='eager': its scales come from a call, and "
                "another compiler is done before there is one"
            )

    def check_saved(self) -> None:
        """Raise ValueError where these options do not suit a graph that is saved or exported."""
        if self.precision == "int8":
            raise ValueError(
                "styleforge: precision='int8' takes its scales from a call, and a graph that is saved or "
                "exported has had none; 'fp16' can be saved"
            )

    @classmethod
    def build(cls, options: Mapping[str, Any] | Options | None = None, mode: str | None = None) -> Options:
        """The ``Options`` for what torch.compile hands to a backend.

        Raises:
            ValueError: for an unknown key (with the nearest valid one), a wrong type or value, or
                a mode given both ways.
        """
        if isinstance(options, Options):
            if mode is not None:
                raise ValueError("styleforge: give the mode inside Options(mode=...) or as mode=, not both")
            return options
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(
                f"styleforge: options must be a dict or sf_compile.Options, got {type(options).__name__}"
            )
        settings = dict(options or {})
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in known:
                raise ValueError(f"styleforge: unknown option {key!r}{_nearest(key, known)}")
        if mode is not None:
            if "mode" in settings:
                raise ValueError("styleforge: mode is given twice, in options and as mode=")
            settings["mode"] = mode
        return cls(**settings)


def _nearest(value: object, choices: list[str] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} Valid: {', '.join(choices)}" if hint else f"; valid: {', '.join(choices)}"


def _check_choice(name: str, value: object, choices: tuple[str, ...], also: str = "") -> None:
    if isinstance(value, str) and value in choices:
        return
    what = repr(value) if isinstance(value, str) else f"{value!r} ({type(value).__name__})"
    suffix = f" {also}" if also else ""
    raise ValueError(f"styleforge: {name} cannot be {what}{_nearest(value, choices)}{suffix}")
