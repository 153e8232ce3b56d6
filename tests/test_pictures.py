import io
import os

import numpy as np
import pytest
from PIL import Image

from sf_compile.cli import CommandError, pictures


def picture(height=8, width=8, alpha=False):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    rgb, mask = np.ascontiguousarray(values[:, :, :3]), np.ascontiguousarray(values[:, :, 3])
    return pictures.Picture(rgb, mask if alpha else None, None)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_other_modes_become_rgb(tmp_path, mode):
    grey = np.linspace(0, 255, 12 * 16).astype(np.uint8).reshape(12, 16)
    if mode == "1":
        grey = np.where(grey > 127, 255, 0).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "P":
        image = Image.fromarray(grey).convert("RGB").quantize(256)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    path = tmp_path / ("in.tif" if mode in ("CMYK", "YCbCr") else "in.png")
    image.save(path)
    read = pictures.read(path)
    assert read.rgb.shape == (12, 16, 3) and read.rgb.dtype == np.uint8
    assert (read.alpha is not None) == (mode in ("LA", "RGBA"))
    tolerance = {"P": 4, "YCbCr": 2}.get(mode, 0)
    assert np.abs(read.rgb.astype(int) - grey[:, :, None]).max() <= tolerance


def test_a_palette_with_a_transparent_colour_has_alpha(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "in.png", transparency=1)
    read = pictures.read(tmp_path / "in.png")
    assert read.alpha.tolist() == [[255, 0]]
    assert read.rgb[0, 0].tolist() == [10, 20, 30]


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "in.tif")
    with pytest.raises(CommandError, match="floating-point"):
        pictures.read(tmp_path / "in.tif")


@pytest.mark.parametrize("name", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP"])
def test_damaged_bytes_are_a_picture_or_one_line(tmp_path, name):
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(picture(23, 31).rgb).save(buffer, name)
    path = tmp_path / "photo"
    outcomes = set()
    for _ in range(60):
        content = bytearray(buffer.getvalue())
        for position in rng.integers(0, min(len(content), 200), 6):
            content[position] = rng.integers(0, 256)
        path.write_bytes(content[: rng.integers(len(content) // 2, len(content) + 1)])
        try:
            outcomes.add(pictures.read(path, longest_side=16).rgb.dtype)
        except CommandError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            outcomes.add(CommandError)
    assert CommandError in outcomes
    assert outcomes <= {CommandError, np.dtype(np.uint8)}


@pytest.mark.parametrize("extension", [".png", ".webp", ".tif", ".tiff", ".jpg", ".JPEG", ".bmp"])
def test_what_is_written_is_read_back(tmp_path, extension):
    path = tmp_path / f"out{extension}"
    lossless = extension not in (".webp", ".jpg", ".JPEG")
    before = picture(9, 14, alpha=pictures.writable_format(path).alpha)
    pictures.write(path, before)
    after = pictures.read(path)
    assert after.rgb.shape == before.rgb.shape
    if before.alpha is None:
        assert after.alpha is None
    else:
        assert np.array_equal(after.alpha, before.alpha)
    if lossless:
        assert np.array_equal(after.rgb, before.rgb)


def test_alpha_is_not_dropped_silently(tmp_path):
    with pytest.raises(CommandError, match="JPEG cannot keep transparency"):
        pictures.write(tmp_path / "out.jpg", picture(alpha=True))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_output_and_no_other_file(tmp_path, monkeypatch):
    def fill(self, file, **options):
        file.write(b"half of a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill)
    (tmp_path / "out.png").write_bytes(b"before")
    with pytest.raises(CommandError, match="No space left on device"):
        pictures.write(tmp_path / "out.png", picture())
    assert (tmp_path / "out.png").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_the_output_has_the_usual_permissions(tmp_path):
    previous = os.umask(0o022)
    try:
        pictures.write(tmp_path / "out.png", picture())
    finally:
        os.umask(previous)
    assert (tmp_path / "out.png").stat().st_mode & 0o777 == 0o644
