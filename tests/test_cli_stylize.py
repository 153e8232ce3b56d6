import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from sf_compile import models
from sf_compile.cli import main, stylize

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    net = models.TransformerNet(width=4, blocks=1)
    with torch.no_grad():
        net.deconv3.conv2d.weight.mul_(40)
        net.deconv3.conv2d.bias.fill_(128)
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture
def run(weights, capsys):
    def call(photo, output, *more, style=weights):
        photos = photo if isinstance(photo, list) else [photo]
        words = ["stylize", *photos, "-o", output, "--weights", style, "--device", "cpu", "--no-compile"]
        words += more
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def pixels(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def opened(path):
    with Image.open(path) as image:
        image.load()
        return image


def stylized(rgb, weights):
    return stylize.stylize(models.load(weights), rgb, torch.device("cpu"), torch.float32)


def refused(result, *parts):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("styleforge stylize: ")
    for part in parts:
        assert part in err


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (5, 4), (8, 12), (33, 50)])
def test_the_size_is_kept_exactly(run, tmp_path, size):
    photo = saved(tmp_path / "in.png", pixels(*size))
    code, out, _ = run(photo, tmp_path / "out.png")
    assert code == 0
    assert opened(tmp_path / "out.png").size == (size[1], size[0])
    assert f"{size[1]}x{size[0]}" in out and out.count("\n") == 1


def test_a_size_the_network_keeps_is_not_padded(run, tmp_path, weights):
    rgb = pixels(12, 16)
    run(saved(tmp_path / "in.png", rgb), tmp_path / "out.png")
    with torch.inference_mode():
        y = models.load(weights)(torch.from_numpy(rgb).permute(2, 0, 1)[None].float())
    expected = y[0].permute(1, 2, 0).clamp(0, 255).round().byte().numpy()
    assert np.array_equal(np.asarray(opened(tmp_path / "out.png")), expected)


def test_other_sizes_are_extended_by_reflection_and_cropped(weights):
    rgb = pixels(11, 14)
    whole = np.concatenate([rgb, rgb[-2:-3:-1]], 0)
    whole = np.concatenate([whole, whole[:, -2:-4:-1]], 1)
    assert whole.shape == (12, 16, 3)
    assert np.array_equal(stylized(rgb, weights), stylized(whole, weights)[:11, :14])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(run, tmp_path, orientation, weights):
    rgb = pixels(8, 12)
    exif = Image.Exif()
    exif[0x0112] = orientation
    run(saved(tmp_path / "in.png", rgb, exif=exif), tmp_path / "out.png")
    upright = {
        1: rgb, 2: rgb[:, ::-1], 3: rgb[::-1, ::-1], 4: rgb[::-1],
        5: rgb.transpose(1, 0, 2), 6: rgb[::-1].transpose(1, 0, 2),
        7: rgb[::-1, ::-1].transpose(1, 0, 2), 8: rgb[:, ::-1].transpose(1, 0, 2),
    }[orientation]  # fmt: skip
    result = opened(tmp_path / "out.png")
    assert np.array_equal(np.asarray(result), stylized(np.ascontiguousarray(upright), weights))
    assert 0x0112 not in result.getexif()


@pytest.mark.parametrize("extension", ["png", "webp", "tif"])
def test_alpha_is_kept(run, tmp_path, extension):
    rgba = pixels(9, 14, 4)
    output = tmp_path / f"out.{extension}"
    assert run(saved(tmp_path / "in.png", rgba), output)[0] == 0
    result = opened(output)
    assert result.mode == "RGBA"
    assert np.array_equal(np.asarray(result)[:, :, 3], rgba[:, :, 3])


def test_alpha_into_a_format_without_it_is_refused_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load", None)
    photo = saved(tmp_path / "in.png", pixels(9, 14, 4))
    refused(run(photo, tmp_path / "out.jpg"), "JPEG cannot keep the photo's transparency")


def test_an_rgb_profile_is_kept_and_another_is_not(run, tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    run(saved(tmp_path / "in.png", pixels(8, 8), icc_profile=srgb), tmp_path / "out.jpg")
    assert opened(tmp_path / "out.jpg").info["icc_profile"] == srgb
    grey = srgb[:16] + b"GRAY" + srgb[20:]
    run(saved(tmp_path / "grey.png", pixels(8, 8, 1), icc_profile=grey), tmp_path / "grey_out.png")
    assert "icc_profile" not in opened(tmp_path / "grey_out.png").info


@pytest.mark.parametrize("size", [24, 7])
def test_size_sets_the_longest_side(run, tmp_path, size):
    run(saved(tmp_path / "in.png", pixels(6, 12)), tmp_path / "out.png", "--size", size)
    assert opened(tmp_path / "out.png").size == (size, round(size / 2))


def bad_photo(tmp_path, kind):
    path = tmp_path / "photo.png"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        buffer = io.BytesIO()
        Image.fromarray(pixels(40, 40)).save(buffer, "JPEG" if kind == "truncated jpeg" else "PNG")
        content = {"empty": b"", "text": b"no picture\n"}.get(kind, buffer.getvalue()[: buffer.tell() // 2])
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "truncated png", "truncated jpeg"])
def test_an_unusable_photo_is_one_line_and_leaves_the_output_alone(run, tmp_path, kind):
    photo = bad_photo(tmp_path, kind)
    output = tmp_path / "out.png"
    refused(run(photo, output), str(photo))
    assert not output.exists()
    output.write_bytes(b"before")
    refused(run(photo, output), str(photo))
    assert output.read_bytes() == b"before"
    assert {path.name for path in tmp_path.iterdir()} <= {"photo.png", "out.png"}


@pytest.mark.parametrize(
    ("name", "part"),
    [("out.gif", "cannot write '.gif'"), ("out", "without extension"), ("absent/out.png", "no such folder"),
     ("folder.png", "is a folder")],
)  # fmt: skip
def test_an_impossible_output_is_refused_before_the_work(run, tmp_path, monkeypatch, name, part):
    monkeypatch.setattr(models, "load", None)
    (tmp_path / "folder.png").mkdir()
    refused(run(saved(tmp_path / "in.png", pixels(8, 8)), tmp_path / name), part)


def test_the_photo_itself_can_be_the_output(run, tmp_path, weights):
    rgb = pixels(8, 8)
    path = saved(tmp_path / "both.png", rgb)
    assert run(path, path)[0] == 0
    assert np.array_equal(np.asarray(opened(path)), stylized(rgb, weights))


def test_unknown_weights_name_close_styles_and_the_list(run, tmp_path):
    photo = saved(tmp_path / "in.png", pixels(8, 8))
    result = run(photo, tmp_path / "out.png", style="multistyle-99")
    refused(result, "did you mean multistyle-9", "--list-styles")


def test_a_foreign_checkpoint_is_one_line(run, tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "foreign.pth")
    photo = saved(tmp_path / "in.png", pixels(8, 8))
    refused(run(photo, tmp_path / "out.png", style=tmp_path / "foreign.pth"), "no key 'conv1.conv2d.weight'")


def test_weights_that_give_nan_write_nothing(run, tmp_path):
    net = models.TransformerNet(width=1, blocks=0)
    with torch.no_grad():
        net.deconv3.conv2d.bias.fill_(torch.nan)
    torch.save(net.state_dict(), tmp_path / "nan.pth")
    photo = saved(tmp_path / "in.png", pixels(8, 8))
    refused(run(photo, tmp_path / "out.png", style=tmp_path / "nan.pth"), "NaN or infinity")
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--precision", "fp16"], "fp16 needs a GPU"),
        (["--size", "0"], "at least 1 pixel"),
        (["--device", "abacus"], "no device 'abacus'"),
        (["--device", "meta"], "not supported"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_impossible_options_are_one_line(run, tmp_path, words, part):
    refused(run(saved(tmp_path / "in.png", pixels(8, 8)), tmp_path / "out.png", *words), part)


def test_too_little_memory_is_one_line(run, tmp_path, monkeypatch):
    def full(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(models.TransformerNet, "forward", full)
    photo = saved(tmp_path / "in.png", pixels(8, 8))
    refused(run(photo, tmp_path / "out.png"), "not enough memory on cpu for 8x8")


def test_sample_is_matplotlibs_photo_unless_a_file_has_that_name(run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib (demo extra) is not installed")
    monkeypatch.chdir(tmp_path)
    assert run("sample", "out.png")[0] == 0
    assert opened("out.png").size == (512, 600)
    Image.fromarray(pixels(8, 8)).save("sample", format="PNG")
    assert run("sample", "out.png")[0] == 0
    assert opened("out.png").size == (8, 8)


def test_list_styles_needs_no_photo(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["stylize", "--list-styles"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.split() == list(models.builtin_styles())


def test_the_compiled_picture_equals_the_eager_one(weights, tmp_path):
    import torch._dynamo

    if "styleforge" not in torch._dynamo.list_backends():
        pytest.skip("sf_compile is not installed, so torch.compile does not know the backend by name")
    rgb = pixels(31, 45)
    photo = saved(tmp_path / "in.png", rgb)
    words = ["stylize", photo, "-o", tmp_path / "out.png", "--weights", weights, "--device", "cpu"]
    torch._dynamo.reset()
    assert main([str(word) for word in words]) == 0
    difference = np.abs(np.asarray(opened(tmp_path / "out.png")).astype(int) - stylized(rgb, weights))
    assert difference.max() <= 1  # a rounding tie may fall either way


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_compiled_picture_on_a_gpu_is_close_to_the_cpus(weights, tmp_path, precision):
    rgb = pixels(31, 45)
    photo = saved(tmp_path / "in.png", rgb)
    words = ["stylize", photo, "-o", tmp_path / "out.png", "--weights", weights, "--device", "cuda"]
    assert main([str(word) for word in [*words, "--precision", precision]]) == 0
    difference = np.asarray(opened(tmp_path / "out.png")).astype(float) - stylized(rgb, weights)
    assert 10 * np.log10(255**2 / max(np.mean(difference**2), 1e-12)) > 35  # dB


@pytest.mark.parametrize("words", [["--help"], ["--version"], []])
def test_the_command_itself_does_not_import_torch(words):
    program = (
        "import sys\nfrom sf_compile.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "styleforge" in result.stdout + result.stderr


def test_bad_use_exits_with_2(capsys):
    assert main([]) == 2
    for words in (["paint"], ["stylize"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
    assert "usage: styleforge" in capsys.readouterr().err


def folder_of(path, *names, size=(8, 12)):
    path.mkdir()
    for seed, name in enumerate(names):
        saved(path / name, pixels(*size, seed=seed))
    return path


def test_several_photos_and_folders_become_pictures_in_a_folder(run, tmp_path, weights):
    album = folder_of(tmp_path / "album", "b.png", "a.bmp")
    (album / "notes.txt").write_text("no picture")
    single = saved(tmp_path / "c.png", pixels(9, 14, 4))
    code, out, err = run([album, single], tmp_path / "new" / "out")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split(":")[0].split("/")[-1] for line in lines[:3]] == ["a.bmp", "b.png", "c.png"]
    assert lines[3].startswith("3 pictures, ") and len(lines) == 4
    for name, source in (("a.bmp", album / "a.bmp"), ("b.png", album / "b.png"), ("c.png", single)):
        result = opened(tmp_path / "new" / "out" / name)
        rgb = np.asarray(opened(source).convert("RGB"))
        assert np.array_equal(np.asarray(result)[..., :3], stylized(rgb, weights))
    assert np.array_equal(np.asarray(result)[..., 3], pixels(9, 14, 4)[..., 3])


def test_a_photo_that_fails_among_several_is_named_and_the_others_are_made(run, tmp_path):
    album = folder_of(tmp_path / "album", "a.png", "c.png")
    (album / "b.png").write_bytes(b"no picture")
    code, out, err = run(album, tmp_path / "out")
    assert code == 1
    assert err == f"styleforge stylize: {album / 'b.png'}: not a picture that Pillow can read\n"
    assert "2 pictures" in out.splitlines()[-1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]


def test_too_little_memory_among_several_names_the_photo(run, tmp_path, monkeypatch):
    forward = models.TransformerNet.forward

    def full(self, x):
        if x.shape[2] == 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x)

    monkeypatch.setattr(models.TransformerNet, "forward", full)
    album = folder_of(tmp_path / "album", "a.png", "b.png")
    saved(album / "a.png", pixels(16, 8))
    code, out, err = run(album, tmp_path / "out")
    assert code == 1 and f"{album / 'a.png'}: not enough memory on cpu for 8x16 pixels" in err
    assert "1 pictures" in out


@pytest.mark.parametrize(
    ("names", "output", "part"),
    [
        (["album", "c.png"], "out.png", "one picture for 3 photos; name a folder"),
        (["album", "album/a.png"], "out", "would both become"),
        (["album"], "album", "would replace the photo itself"),
        (["empty"], "out", "no pictures in this folder"),
        (["album"], "c.png/out", "cannot be a folder"),
    ],
)
def test_impossible_outputs_of_several_are_refused_before_the_work(
    run, tmp_path, monkeypatch, names, output, part
):
    monkeypatch.setattr(models, "load", None)
    folder_of(tmp_path / "album", "a.png", "b.png")
    folder_of(tmp_path / "empty")
    saved(tmp_path / "c.png", pixels(8, 8))
    refused(run([tmp_path / name for name in names], tmp_path / output), part)
    assert opened(tmp_path / "c.png").size == (8, 8)
