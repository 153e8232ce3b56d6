"""Read photographs into RGB arrays and write stylised ones, without loss of size, turn, alpha or profile."""

from __future__ import annotations

import io
import os
import secrets
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sf_compile.cli import CommandError

try:
    from PIL import Image, ImageCms, ImageOps
except ModuleNotFoundError as missing:
    raise CommandError('reading pictures needs Pillow: pip install "sf_compile[demo]"') from missing

SAMPLE = "sample"  # stands for the photograph of Grace Hopper that matplotlib ships

# What Pillow raises for damaged files, seen by feeding it truncated and altered pictures.
DAMAGE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError,
    struct.error, zlib.error,
)


@dataclass(frozen=True)
class Format:
    """A file format that can be written: Pillow's name for it, and how to write it."""

    name: str
    alpha: bool
    options: dict[str, object]


_JPEG = Format("JPEG", alpha=False, options={"quality": 95, "subsampling": 0})
_TIFF = Format("TIFF", alpha=True, options={"compression": "tiff_lzw"})
FORMATS = {
    ".png": Format("PNG", alpha=True, options={}),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": Format("WEBP", alpha=True, options={"quality": 95}),
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".bmp": Format("BMP", alpha=False, options={}),
}


@dataclass(frozen=True)
class Picture:
    """A picture upright as it is meant to be seen.

    Attributes:
        rgb: uint8 of shape (H, W, 3).
        alpha: uint8 of shape (H, W), 255 opaque; None where the file has no transparency.
        icc_profile: the RGB colour profile, as in the file; None where there is none.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None
    icc_profile: bytes | None


def find(name: str) -> Path:
    """Return the path that a PHOTO argument means: a file, or matplotlib's photograph for ``sample``."""
    path = Path(name)
    if name != SAMPLE or path.exists():
        return path
    try:
        from matplotlib import cbook
    except ModuleNotFoundError as error:
        raise CommandError('the sample photo needs matplotlib: pip install "sf_compile[demo]"') from error
    return Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


def in_folder(folder: Path) -> list[Path]:
    """Return the files in a folder, not below it, that have the name of a picture that Pillow reads, by name.

    Raises:
        CommandError: there is none.
    """
    Image.init()
    readable = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in readable and path.is_file())
    if not found:
        raise CommandError(f"{folder}: no pictures in this folder")
    return found


def read(path: Path, longest_side: int | None = None) -> Picture:
    """Read a picture file: its first frame, upright (EXIF), 8 bits a channel, RGB with or without alpha.

    Grey, palette, 16-bit, CMYK and other integer modes become RGB, CMYK and grey by their colour
    profile if they have one.

    Args:
        path: the file, in any format Pillow reads.
        longest_side: scale the picture so that its longer side has this many pixels; None keeps it.

    Raises:
        CommandError: a missing, unreadable, truncated or non-picture file, or floating-point pixels.
    """
    try:
        # What makes a picture unusable is raised; Pillow's warnings are about odd metadata and large sizes.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as file:
                file.load()
                image = ImageOps.exif_transpose(file)
    except Image.UnidentifiedImageError as error:
        raise CommandError(f"{path}: not a picture that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise CommandError(f"{path}: {error}") from error
    except DAMAGE as error:
        if isinstance(error, OSError) and error.strerror:
            raise CommandError(f"{path}: {error.strerror}") from error
        raise CommandError(f"{path}: a damaged or truncated picture ({_one_line(error)})") from error
    return _picture(image, path, longest_side)


def writable_format(path: Path) -> Format:
    """Return the format for an output path, after checking that it can be written at all.

    Raises:
        CommandError: an extension that is not in FORMATS, a folder that is missing or closed, or a
            folder where the file should be.
    """
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        found = repr(path.suffix) if path.suffix else "a name without extension"
        raise CommandError(f"{path}: cannot write {found}; use {', '.join(FORMATS)}")
    Image.init()
    if form.name not in Image.SAVE:
        raise CommandError(f"{path}: this Pillow was built without {form.name}; use .png")
    if path.is_dir():
        raise CommandError(f"{path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise CommandError(f"{path.parent}: no such folder")
    if not os.access(path.parent, os.W_OK):
        raise CommandError(f"{path.parent}: no permission to write in this folder")
    return form


def write(path: Path, picture: Picture) -> None:
    """Write a picture in one step: `path` is either as before or complete, never half written.

    Raises:
        CommandError: as `writable_format`; alpha in a format without it; or the disk refuses.
    """
    form = writable_format(path)
    image = Image.fromarray(picture.rgb)
    if picture.alpha is not None:
        if not form.alpha:
            raise CommandError(f"{path}: {form.name} cannot keep transparency; use .png, .webp or .tif")
        image.putalpha(Image.fromarray(picture.alpha))
    options = dict(form.options)
    if picture.icc_profile is not None:
        options["icc_profile"] = picture.icc_profile
    # Not tempfile: its files are private to the user, and a picture should have the usual permissions.
    temporary = path.parent / f".styleforge-{secrets.token_hex(8)}.part"
    try:
        try:
            with open(temporary, "xb") as file:
                image.save(file, format=form.name, **options)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _one_line(error)
        raise CommandError(f"{path}: could not be written ({reason})") from error


def _picture(image: Image.Image, path: Path, longest_side: int | None) -> Picture:
    profile = image.info.get("icc_profile")
    if image.mode == "F":
        raise CommandError(f"{path}: floating-point pixels have no agreed range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    transparent = "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA")
    if profile is not None and profile[16:20] != b"RGB ":  # ICC.1 7.2.6: the profile's colour space
        image = image if transparent else _by_profile(image, profile)
        profile = None
    try:
        image = image.convert("RGBA" if transparent else "RGB")
    except ValueError as error:
        raise CommandError(f"{path}: no conversion from {image.mode} to RGB; save it as RGB") from error
    if longest_side is not None:
        scale = longest_side / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    alpha = np.ascontiguousarray(pixels[:, :, 3]) if transparent else None
    return Picture(np.ascontiguousarray(pixels[:, :, :3]), alpha, profile)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of up to 16 bits, as modes I;16* and I hold it, in 8; Pillow's own would clip at 255."""
    values = np.asarray(image).astype(np.float64)
    return Image.fromarray(np.clip(np.rint(values / 257), 0, 255).astype(np.uint8))


def _by_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """CMYK or grey to sRGB by the picture's own profile; unchanged where the two do not fit together."""
    if image.mode not in ("CMYK", "L"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image
    return image if converted is None else converted


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
