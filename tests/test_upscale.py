"""Running the generator over images of any size, and the modes --pretrained, --evaluate and --export."""

import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_image, refusal, run
from PIL import Image

import data
import losses
import main
import model


@pytest.fixture(scope="module")
def disturbed():
    """A generator with random statistics and gammas: a fresh one is an interpolation, which looks at few pixels."""
    keras.utils.set_random_seed(0)
    with mock.patch.object(model, "BLOCKS", 2):  # with two, it takes a fraction of the time
        network, rng = model.generator(), np.random.default_rng(0)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.2, 0.4, 64), *rng.normal(0, 0.05, (2, 64)), rng.uniform(0.5, 1.5, 64)])
    tail = network.get_layer("tail")
    tail.kernel.assign_add(rng.normal(0, 0.001, tail.kernel.shape))
    return network


@pytest.fixture
def weights(tmp_path_factory, monkeypatch):
    """A file of SRGAN's weights, with SRResNet's beside it; generators have two blocks."""
    monkeypatch.setattr(model, "BLOCKS", 2)
    keras.utils.set_random_seed(0)
    network, folder = model.generator(), tmp_path_factory.mktemp("weights")
    network.save_weights(folder / "srgan.weights.h5")
    tail = network.get_layer("tail")
    tail.kernel.assign(0.8 * tail.kernel)
    network.save_weights(folder / "srresnet.weights.h5")
    return folder / "srgan.weights.h5"


def raw(network, lr):
    """The image upscaled in one piece: `(h, w, 3)` to float32 `(4h, 4w, 3)`."""
    return network(np.float32(lr[None]), training=False)[0].numpy()


def assert_equal_but_for_rounding(sr, expected):
    difference = np.abs(np.int32(sr) - np.int32(np.rint(expected.clip(0, 255))))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


TILES = [(1, 1, (768, 128)), (2, 50, (30, 7)), (70, 61, (43, 24)), (60, 40, (99, 21))]


@pytest.mark.parametrize("height, width, tiles", TILES)
def test_tiles_are_exact(disturbed, height, width, tiles):
    lr = make_image(3)[:height, :width]
    sr = model.make_upscaler(disturbed, tiles=tiles)(lr)
    assert sr.std() > 20 or sr.size < 100
    assert_equal_but_for_rounding(sr, raw(disturbed, lr))


def look_far(network, axis, end):
    """Let a generator take a part of each value from the farthest pixel that it reaches in one direction.

    Each convolution shifts the image by its radius, 16 blocks x + 10 shift(x) leave (10 / 11)^16 at full distance.
    """
    rgb = np.arange(3)
    for layer in network.layers:
        if isinstance(layer, (keras.layers.Conv2D, model.ShufflePReLUConv)):
            kernel, tap = np.zeros(layer.kernel.shape), [layer.kernel.shape[0] // 2] * 2
            tap[axis] = end
            for i in range(0, kernel.shape[3], 64):  # the up-convolutions have four times 64
                kernel[*tap, rgb, i + rgb] = 1
            layer.kernel.assign(kernel)
            layer.bias.assign(np.full(layer.bias.shape, -1.0 if layer.name == "tail" else 0.0))
        elif layer.name.endswith("norm2") or layer.name == "trunk_norm":
            layer.gamma.assign(np.full(64, 10.0 if layer.name != "trunk_norm" else 11.0**-16))


def test_halos_are_enough_and_no_more_than_that(monkeypatch):
    network = model.generator()
    upscaler = model.make_upscaler(network, tiles=(44, 20))
    for axis, end in ((0, 0), (0, -1), (1, 0), (1, -1)):
        look_far(network, axis, end)
        lr = make_image(3, 8, 88) if axis == 0 else make_image(3, 88, 8)
        expected = raw(network, lr)
        assert_equal_but_for_rounding(upscaler(lr), expected)
        for name in ("TRUNK_HALO", "TAIL_HALO"):
            with monkeypatch.context() as patch:
                patch.setattr(model, name, getattr(model, name) - 1)
                assert np.abs(upscaler(lr) - expected.clip(0, 255)).max() > 2


@pytest.mark.parametrize("kind, scale", [(np.uint8, 1), (np.uint16, 257)])
def test_grey_stays_grey_and_the_rest_is_the_networks(disturbed, kind, scale):
    lr = make_image(1, 40, 30)
    grey = lr[..., :1].repeat(3, axis=2)
    upscaler, expected = model.make_upscaler(disturbed), raw(disturbed, grey)
    sr = upscaler(kind(grey) * kind(scale))
    assert np.ptp(expected, axis=-1).mean() > 1 and np.ptp(sr, axis=-1).max() == 0 and sr.dtype == kind
    np.testing.assert_array_equal(sr[..., :1], upscaler(kind(grey[..., :1]) * kind(scale)))
    assert np.abs(sr[..., 0] / scale - expected.mean(-1).clip(0, 255)).max() < 0.51 / scale + 0.001
    lr[:-1] = grey[:-1]  # one row with colour
    sr = upscaler(kind(lr) * kind(scale))
    assert np.abs(sr / scale - raw(disturbed, lr).clip(0, 255)).max() < 0.51 / scale + 0.001


def test_ensemble_is_the_mean_of_eight(disturbed):
    lr, total = make_image(5, 50, 30), 0
    for mirror in (1, -1):
        for turn in range(4):
            total = total + np.rot90(raw(disturbed, np.rot90(lr[::mirror], turn)), -turn)[::mirror]
    assert_equal_but_for_rounding(model.make_upscaler(disturbed, ensemble=True, tiles=(32, 20))(lr), total / 8)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A current folder with an image, links to it, and what is in the way."""
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "empty", "links", "out", "folder.tflite"):
        Path(folder).mkdir(parents=True)
    for name in ("a.png", "folder/a.png", "out/b.png", "links/b.png"):
        Image.new("RGB", (30, 20)).save(name)
    Image.new("L", (16_400, 1)).save("long.png")
    os.mkfifo("fifo.jpg")
    os.symlink("a.png", "link.png")
    os.symlink("../out/b.png", "links/a.png")
    for name in ("bad.png", "text.txt", "srresnet.weights.h5"):
        Path(name).write_text("text")


REFUSED = {  # a word of the line, and flags
    "a.png is also an input": "a.png --output a.png; a.png --output folder/../a.png; a.png --output ./; "
    "link.png --output a.png; folder --output folder",
    "overwritten": "a.png --output link.png; links --output out",
    ".webp": "a.png --output b.xyz; a.png --output b; empty --output out",
    "65600x4": "long.png --output b.jpg",
    "text.txt": "text.txt --output b.png; folder --output text.txt; a.png --output text.txt/; --evaluate text.txt; "
    "folder --output text.txt/out",
    "must be a folder": "folder; folder --output b.png",
    "nowhere": "nowhere.png; a.png --output b.png --weights nowhere.weights.h5; --evaluate nowhere",
    "bad.png": "bad.png --output b.png",
    "fifo.jpg": "fifo.jpg --output b.png",
    "no images in empty": "--evaluate empty",
    "folder": "--export folder; --export folder.tflite",
}


@pytest.mark.parametrize("word, flags", [(word, flags) for word, all in REFUSED.items() for flags in all.split("; ")])
def test_refused_before_any_work(places, capsys, word, flags):
    before = sorted(os.listdir("."))
    argv = flags.split() if flags.startswith("--") else ["--pretrained", "--input", *flags.split()]
    assert word in refusal(capsys, *argv) and sorted(os.listdir(".")) == before


def test_a_folder_of_images_of_which_some_are_done(tmp_path, weights, capsys):
    source, target, image = tmp_path / "in", tmp_path / "new" / "out", make_image(2, 30, 20)
    source.mkdir()
    for kind in ("png", "jpg", "jfif", "webp", "bmp", "tif"):
        Image.fromarray(image).save(source / f"a.{kind}")
    (source / "bad.png").write_bytes(b"not an image")
    (source / "notes.txt").write_text("not read")
    argv = ["--pretrained", "--input", source, "--output", target, "--weights", weights]
    assert run(*argv) == 1
    error = capsys.readouterr().err
    assert str(source / "bad.png") in error and "1 of 7" in error and "\r" not in error
    assert {path.name for path in target.iterdir()} == {path.name for path in source.glob("a.*")}
    for path in target.iterdir():
        score = losses.psnr(data.read_rgb(path), data.bicubic(image))
        assert score > (35 if path.suffix in (".png", ".bmp", ".tif") else 20)

    (source / "bad.png").unlink()
    (target / "a.bmp").unlink()
    os.utime(source / "a.jpg", (2e9, 2e9))  # newer than its result
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    for more, redone in ((["--skip_existing"], {"a.bmp", "a.jpg"}), ([], {*before, "a.bmp"})):
        assert run(*argv, *more) == 0
        assert ("4 of 6" in capsys.readouterr().out) == bool(more)
        after = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
        assert {name for name in after if after[name] != before.get(name)} == redone


def test_one_image_into_a_folder_and_what_fails(places, weights, capsys, monkeypatch):
    for output in ("new/", "empty"):
        assert run("--pretrained", "--input", "a.png", "--output", output, "--weights", weights) == 0
        assert Image.open(Path(output) / "a.png").size == (120, 80)

    def exhausted(*tensors):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    argv = ["--pretrained", "--input", "a.png", "--output", "b.png", "--weights"]
    assert "text.txt" in refusal(capsys, *argv, "text.txt", started=True)
    assert "--blend" in refusal(capsys, *argv, weights.with_name("srresnet.weights.h5"), "--blend", 0, started=True)
    weights.with_name("srresnet.weights.h5").unlink()
    assert "srresnet.weights.h5" in refusal(capsys, *argv, weights, "--blend", 0, started=True)
    monkeypatch.setattr(tf, "function", lambda *_, **__: exhausted)
    assert "out of memory" in refusal(capsys, *argv, weights, started=True)
    with monkeypatch.context() as patch:  # the tests may run as root, who may write everywhere
        patch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        assert "b.png" in refusal(capsys, *argv, weights)
    assert not Path("b.png").exists()


def load_exported(path):
    """A function from LR to SR that runs what --export wrote."""
    if path.suffix == ".onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(path)
        return lambda lr: session.run(None, {"lr": lr})[0]
    if path.suffix == ".tflite":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that tf.lite will be removed
            run = tf.lite.Interpreter(str(path)).get_signature_runner()
        return lambda lr: run(lr=lr)["output_0"]
    loaded = tf.saved_model.load(path)
    return lambda lr: loaded.serve(lr).numpy()  # and keeps `loaded`


@pytest.mark.parametrize("name", ["saved", "a.tflite", "a.onnx"])
def test_exported_generator_computes_the_same(tmp_path, weights, capsys, monkeypatch, name):
    path = tmp_path / name
    if name == "a.onnx":
        with monkeypatch.context() as patch:
            patch.setattr(main.importlib.util, "find_spec", lambda name: None)
            assert "pip install tf2onnx" in refusal(capsys, "--export", path)
        pytest.importorskip("tf2onnx")
    assert run("--export", path, "--weights", weights, "--blend", 0.25, "--precision", "bfloat16") == 0
    assert os.listdir(tmp_path) == [name]
    srresnet, srgan = (model.load_generator(weights.with_name(f"{name}.weights.h5")) for name in ("srresnet", "srgan"))
    srgan.set_weights([0.75 * a + 0.25 * b for a, b in zip(srresnet.get_weights(), srgan.get_weights())])
    exported, rng = load_exported(path), np.random.default_rng(0)
    for size in ((13, 22), (37, 9)):
        lr = np.float32(rng.integers(0, 2, (*size, 3)) * 255)
        sr = raw(srgan, lr)
        assert sr.min() < -1 and sr.max() > 256  # it leaves 0 to 255
        np.testing.assert_allclose(exported(lr[None])[0], sr.clip(0, 255), atol=0.01)


@pytest.mark.parametrize("number", [0, signal.SIGTERM])
def test_an_export_that_fails_leaves_what_was_there(tmp_path, weights, monkeypatch, capsys, number):
    def fail(network, path, *args, **kwargs):
        Path(path).write_text("half")
        os.kill(os.getpid(), number)
        raise tf.errors.ResourceExhaustedError(None, None, "disk full")

    (tmp_path / "a.tflite").write_text("before")
    monkeypatch.setattr(keras.Model, "export", fail)
    argv = ["--export", tmp_path / "a.tflite", "--weights", weights]
    if number:
        with pytest.raises(SystemExit, match="143"):
            run(*argv)
    else:
        assert "disk full" in refusal(capsys, *argv, started=True)
    assert os.listdir(tmp_path) == ["a.tflite"] and (tmp_path / "a.tflite").read_text() == "before"


def scores(capsys, *argv):
    """{name: [bicubic's PSNR and SSIM, the model's PSNR and SSIM]} of what --evaluate prints."""
    assert run("--evaluate", *argv) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.rsplit(maxsplit=4) for line in lines if re.search(r"\d\.\d{4}$", line)]
    return {row[0].strip(): list(map(float, row[1:])) for row in rows}


def test_scores_are_those_of_the_upscaled_files(tmp_path, weights, capsys):
    hr_folder, lr_folder, sr_folder = (tmp_path / name for name in ("HR", "LR_x4", "sr"))
    hr_folder.mkdir()
    lr_folder.mkdir()
    for name, channels in (("0", 3), ("1", 1)):  # the second has one channel
        hr = make_image(int(name), 96, 80)[..., :channels]
        lr = data.degrade(np.broadcast_to(hr, (80, 96, 3)))[..., :channels]
        Image.fromarray(hr.squeeze()).save(hr_folder / f"{name}.png")
        Image.fromarray(lr.squeeze()).save(lr_folder / f"{name}x4.png")
    found = scores(capsys, tmp_path, "--weights", weights)
    assert found == scores(capsys, hr_folder, "--weights", weights)
    assert run("--pretrained", "--input", lr_folder, "--output", sr_folder, "--weights", weights) == 0
    expected = {}
    for name in "01":
        hr, sr = (data.read_image(path)[0] for path in (hr_folder / f"{name}.png", sr_folder / f"{name}x4.png"))
        bicubic = data.bicubic(data.read_rgb(lr_folder / f"{name}x4.png"))[..., : hr.shape[2]]
        expected[name] = [score(image, hr) for image in (bicubic, sr) for score in (losses.psnr, losses.ssim)]
    expected["mean of 2"] = np.mean([*expected.values()], axis=0)
    assert found == {name: pytest.approx(values, abs=0.0051) for name, values in expected.items()}
    (hr_folder / "0.png").write_bytes((hr_folder / "1.png").read_bytes()[:99])
    assert str(hr_folder / "0.png") in refusal(capsys, "--evaluate", hr_folder, "--weights", weights, started=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_100_megapixels_in_bounded_memory(tmp_path, mode):
    Image.fromarray(make_image(0, 500, 500)).resize((2500, 2500)).convert(mode).save(tmp_path / "a.png")
    code = "import main, sys; from benchmark import peak_memory; print(main.main(sys.argv[1:]), peak_memory())"
    argv = [sys.executable, "-c", code, "--pretrained", "--input", "a.png", "--output", "b.png"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2]))}
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    code, peak = done.stdout.split()[-2:]
    assert code == "0" and float(peak) < 2500, done.stderr  # MB
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(tmp_path / "b.png") as image:
        assert image.size == (10_000, 10_000) and image.mode == mode
