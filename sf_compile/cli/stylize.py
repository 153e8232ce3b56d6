"""``styleforge stylize``: paint photos in the style of a trained network."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sf_compile import models
from sf_compile.cli import CommandError, devices, pictures
from sf_compile.pipeline import PictureError, PictureStream, StylizePipeline

DESCRIPTION = (
    "Paint photos in the style of a trained network. An output has the photo's size, transparency and "
    "colour profile, and appears only when it is complete."
)
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}
_DEPTH = 2  # photos are large, and reading and writing their files take longer than the network


class _ListStyles(argparse.Action):
    """Print the names of the built-in styles and exit, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        print("\n".join(models.builtin_styles()))
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``styleforge stylize``."""
    parser.add_argument("photos", nargs="+", metavar="PHOTO",
                        help="picture files, folders of them, or 'sample' for matplotlib's photo")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUT",
                        help=f"picture to write ({', '.join(pictures.FORMATS)}); for several photos, or a "
                        "folder, the folder to write them to")
    parser.add_argument("--weights", required=True, metavar="FILE|STYLE",
                        help="a checkpoint, or a built-in style such as multistyle-19")
    parser.add_argument("--list-styles", action=_ListStyles, nargs=0,
                        help="list the built-in styles and exit")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--size", type=int, metavar="PIXELS",
                        help="first scale a photo to this longest side (default: keep its size)")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="fp32",
                        help="fp16 is faster, and for GPUs only (default: fp32)")
    parser.add_argument("--no-compile", action="store_true",
                        help="run eager PyTorch instead of the fused kernels")


@dataclass(frozen=True)
class _Job:
    """A photo, and the picture to make of it."""

    photo: Path
    output: Path


def run(arguments: argparse.Namespace) -> int:
    """Stylise photos; see `add_arguments`. Returns 0, or 1 if some of several photos could not be.

    Raises:
        CommandError: bad arguments, an unusable checkpoint or output, or, of a single photo, an unusable
            one or too little memory for it.
    """
    if arguments.size is not None and arguments.size < 1:
        raise CommandError(f"--size must be at least 1 pixel, got {arguments.size}")
    device = devices.find(arguments.device)
    if arguments.precision == "fp16" and device.type == "cpu":
        raise CommandError("--precision fp16 needs a GPU; leave it out, or choose one with --device cuda")
    if len(arguments.photos) == 1 and not Path(arguments.photos[0]).is_dir():
        job = _Job(pictures.find(arguments.photos[0]), arguments.output)
        pictures.writable_format(job.output)
        photos = _Photos([job], arguments.size)
        photos.read_first()
    else:
        photos = _Photos(_jobs(arguments.photos, arguments.output), arguments.size)
    dtype = PRECISIONS[arguments.precision]
    module = devices.load_network(arguments.weights).to(device=device, dtype=dtype)
    network = module if arguments.no_compile else devices.compile_network(module)
    how = f"{arguments.weights} on {device} in {arguments.precision}"
    included = "eager" if arguments.no_compile else "compilation included"
    start = time.perf_counter()
    if len(photos.jobs) == 1:
        rgb = stylize(network, photos, device, dtype)
        seconds = time.perf_counter() - start
        print(f"{photos.write(0, rgb)}, {how}, {seconds:.2f} s ({included})")
        return 0
    failed = 0
    with _pipeline(network, device, dtype)(photos) as stream:
        for index in range(len(photos.jobs)):
            try:
                rgb = _next(stream, device, f"{photos.jobs[index].photo}: ")
                print(photos.write(index, rgb), flush=True)
            except CommandError as error:
                print(f"styleforge stylize: {error}", file=sys.stderr, flush=True)
                failed += 1
    seconds = time.perf_counter() - start
    done = f"{len(photos.jobs) - failed} pictures, {how}, {seconds:.2f} s"
    print(f"{done} ({included}, and the files read and written)")
    return 1 if failed else 0


class _Photos:
    """Reads the photos of jobs one after the other, and keeps what a result needs beside its pixels."""

    def __init__(self, jobs: Sequence[_Job], size: int | None) -> None:
        self.jobs = jobs
        self._size = size
        self._next = 0
        self._first: np.ndarray | None = None
        self._rest: dict[int, pictures.Picture] = {}

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        """The pixels of the next photo.

        Raises:
            CommandError: it cannot be used; the next call goes on with the one after it.
        """
        if self._first is not None:
            first, self._first = self._first, None
            return first
        if self._next == len(self.jobs):
            raise StopIteration
        index = self._next
        self._next += 1
        job = self.jobs[index]
        try:
            photo = pictures.read(job.photo, self._size)
        except MemoryError as error:
            raise CommandError(
                f"{job.photo}: not enough memory at this size; try a smaller --size"
            ) from error
        form = pictures.writable_format(job.output)
        if photo.alpha is not None and not form.alpha:
            raise CommandError(
                f"{job.output}: {form.name} cannot keep the photo's transparency; use .png, .webp or .tif"
            )
        self._rest[index] = dataclasses.replace(photo, rgb=np.empty((0, 0, 3), np.uint8))
        return photo.rgb

    def read_first(self) -> None:
        """Find out now whether the first photo can be used."""
        self._first = next(self)

    def write(self, index: int, rgb: np.ndarray) -> str:
        """Write what became of a photo; say so."""
        output = self.jobs[index].output
        pictures.write(output, dataclasses.replace(self._rest.pop(index), rgb=rgb))
        height, width = rgb.shape[:2]
        return f"{output}: {width}x{height}"


def _jobs(names: Sequence[str], folder: Path) -> list[_Job]:
    """What to make of several photos, or of those in folders; the output folder is made."""
    photos: list[Path] = []
    for name in names:
        path = Path(name)
        photos += pictures.in_folder(path) if path.is_dir() else [pictures.find(name)]
    if folder.suffix.lower() in pictures.FORMATS and not folder.is_dir():
        raise CommandError(f"{folder}: one picture for {len(photos)} photos; name a folder")
    jobs: dict[Path, _Job] = {}
    for photo in photos:
        suffix = photo.suffix if photo.suffix.lower() in pictures.FORMATS else ".png"
        output = folder / (photo.stem + suffix)
        if output in jobs:
            raise CommandError(f"{photo} and {jobs[output].photo} would both become {output}; rename one")
        if output.resolve() == photo.resolve():
            raise CommandError(f"{output}: would replace the photo itself; choose another folder")
        jobs[output] = _Job(photo, output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{folder}: cannot be a folder ({error.strerror})") from error
    return list(jobs.values())


def _pipeline(
    network: Callable[[torch.Tensor], torch.Tensor], device: torch.device, dtype: torch.dtype
) -> StylizePipeline:
    return StylizePipeline(
        network, device=device, dtype=dtype, side_multiple=models.SIDE_MULTIPLE, min_side=models.MIN_SIDE,
        depth=_DEPTH,
    )  # fmt: skip


def stylize(
    network: Callable[[torch.Tensor], torch.Tensor],
    photo: np.ndarray | Iterable[np.ndarray],
    device: torch.device,
    dtype: torch.dtype,
) -> np.ndarray:
    """Stylise one picture: uint8 (H, W, 3) in, uint8 of the same shape out, whatever H and W.

    The network takes and returns RGB 0..255 of shape (1, 3, H', W') in `dtype` on `device`. The
    picture is extended by reflection at the right and bottom to sides the network keeps, and the
    result cropped back. `photo` may be an iterable that has it.

    Raises:
        CommandError: the network returned NaN or infinity, or another shape; or too little memory.
    """
    with _pipeline(network, device, dtype)([photo] if isinstance(photo, np.ndarray) else photo) as stream:
        return _next(stream, device)


def _next(stream: PictureStream, device: torch.device, name: str = "") -> np.ndarray:
    """The next picture of a stream, called `name`, with its errors as one line for the user."""
    try:
        rgb = next(stream)
    except PictureError as error:
        cause = error.__cause__
        if isinstance(cause, CommandError):  # the photo's
            raise cause from None
        # torch.OutOfMemoryError on a GPU; the CPU's allocator raises a plain RuntimeError.
        if isinstance(cause, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(cause):
            height, width = error.sides or (0, 0)
            raise CommandError(
                f"{name}not enough memory on {device} for {width}x{height} pixels; try a smaller --size"
            ) from error
        if cause is None or isinstance(cause, ValueError):
            raise CommandError(name + error.what) from error
        raise
    assert isinstance(rgb, np.ndarray)
    return rgb
