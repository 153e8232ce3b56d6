"""``styleforge stylize``: paint a photo in the style of a trained network."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sf_compile import models
from sf_compile.cli import CommandError, devices, pictures

DESCRIPTION = (
    "Paint a photo in the style of a trained network. The output has the photo's size, transparency and "
    "colour profile, and appears only when it is complete."
)
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}


class _ListStyles(argparse.Action):
    """Print the names of the built-in styles and exit, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        print("\n".join(models.builtin_styles()))
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``styleforge stylize``."""
    parser.add_argument("photo", metavar="PHOTO", help="a picture file, or 'sample' for matplotlib's photo")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUT",
                        help=f"picture to write ({', '.join(pictures.FORMATS)})")
    parser.add_argument("--weights", required=True, metavar="FILE|STYLE",
                        help="a checkpoint, or a built-in style such as multistyle-19")
    parser.add_argument("--list-styles", action=_ListStyles, nargs=0,
                        help="list the built-in styles and exit")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--size", type=int, metavar="PIXELS",
                        help="first scale the photo to this longest side (default: keep its size)")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="fp32",
                        help="fp16 is faster, and for GPUs only (default: fp32)")
    parser.add_argument("--no-compile", action="store_true",
                        help="run eager PyTorch instead of the fused kernels")


def run(arguments: argparse.Namespace) -> int:
    """Stylise one photo; see `add_arguments`. Returns 0.

    Raises:
        CommandError: bad arguments, an unusable photo, checkpoint or output, or too little memory.
    """
    output: Path = arguments.output
    if arguments.size is not None and arguments.size < 1:
        raise CommandError(f"--size must be at least 1 pixel, got {arguments.size}")
    device = devices.find(arguments.device)
    if arguments.precision == "fp16" and device.type == "cpu":
        raise CommandError("--precision fp16 needs a GPU; leave it out, or choose one with --device cuda")
    form = pictures.writable_format(output)
    path = pictures.find(arguments.photo)
    try:
        photo = pictures.read(path, arguments.size)
    except MemoryError as error:
        raise CommandError(f"{path}: not enough memory at this size; try a smaller --size") from error
    if photo.alpha is not None and not form.alpha:
        raise CommandError(
            f"{output}: {form.name} cannot keep the photo's transparency; use .png, .webp or .tif"
        )
    dtype = PRECISIONS[arguments.precision]
    module = devices.load_network(arguments.weights).to(device=device, dtype=dtype)
    network = module if arguments.no_compile else devices.compile_network(module)
    start = time.perf_counter()
    try:
        rgb = stylize(network, photo.rgb, device, dtype)
    except RuntimeError as error:
        # torch.OutOfMemoryError on a GPU; the CPU's allocator raises a plain RuntimeError.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        height, width = photo.rgb.shape[:2]
        raise CommandError(
            f"not enough memory on {device} for {width}x{height} pixels; try a smaller --size"
        ) from error
    seconds = time.perf_counter() - start
    pictures.write(output, pictures.Picture(rgb, photo.alpha, photo.icc_profile))
    height, width = rgb.shape[:2]
    how = "eager" if arguments.no_compile else "compilation included"
    print(
        f"{output}: {width}x{height}, {arguments.weights} on {device} in {arguments.precision}, "
        f"{seconds:.2f} s ({how})"
    )
    return 0


def stylize(
    network: Callable[[torch.Tensor], torch.Tensor],
    rgb: np.ndarray,
    device: torch.device,
    dtype: torch.dtype,
) -> np.ndarray:
    """Stylise one picture: uint8 (H, W, 3) in, uint8 of the same shape out, whatever H and W.

    The network takes and returns RGB 0..255 of shape (1, 3, H', W') in `dtype` on `device`. The
    picture is extended by reflection at the right and bottom to sides the network keeps, and the
    result cropped back.

    Raises:
        CommandError: the network returned NaN or infinity, or another shape.
    """
    height, width = rgb.shape[:2]
    padded = np.pad(rgb, ((0, _extension(height)), (0, _extension(width)), (0, 0)), mode="reflect")
    x = torch.from_numpy(padded).to(device).permute(2, 0, 1).unsqueeze(0).to(dtype).contiguous()
    with torch.inference_mode():
        y = network(x)
        if y.shape != x.shape:
            raise CommandError(f"the network turned shape {tuple(x.shape)} into {tuple(y.shape)}")
        if not torch.isfinite(y).all():
            raise CommandError("the network returned NaN or infinity; try --precision fp32, or other weights")
        pixels = y[0, :, :height, :width].clamp(0, 255).round().to(torch.uint8)
        return pixels.permute(1, 2, 0).contiguous().cpu().numpy()


def _extension(side: int) -> int:
    """Pixels to add to a side so that it is a multiple of SIDE_MULTIPLE and at least MIN_SIDE."""
    multiple = models.SIDE_MULTIPLE
    return -(-max(side, models.MIN_SIDE) // multiple) * multiple - side
