"""The generator on images of any size, and in other programs' formats."""

import os
import signal
import warnings
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_image, refusal, run
from test_networks import disturb

import main
import model


@pytest.fixture(scope="module")
def disturbed():
    """A generator with random weights: a fresh one is an interpolation, which looks at few pixels."""
    keras.utils.set_random_seed(0)
    network = model.generator(blocks=2)  # with two, it takes a fraction of the time
    disturb(network)
    tail = network.get_layer("tail")
    tail.kernel.assign_add(np.random.default_rng(0).normal(0, 0.001, tail.kernel.shape))
    return network


@pytest.fixture
def weights(tmp_path_factory, monkeypatch):
    """A file of SRGAN's weights, with SRResNet's beside it; the program's generators have two blocks."""
    monkeypatch.setattr(model, "generator", partial(model.generator, blocks=2))
    keras.utils.set_random_seed(0)
    network = model.generator()
    folder = tmp_path_factory.mktemp("weights")
    network.save_weights(folder / "srgan.weights.h5")
    tail = network.get_layer("tail")
    tail.kernel.assign(0.8 * tail.kernel)
    network.save_weights(folder / "srresnet.weights.h5")
    return folder / "srgan.weights.h5"


def raw(network, lr):
    """What the network makes of an image in one piece: `(h, w, 3)` to float32 `(4h, 4w, 3)`."""
    return network(np.float32(lr[None]), training=False)[0].numpy()


def mirrored(network, lr):
    """The same of an image that is mirrored at its border."""
    lr = np.pad(lr, ((4, 4), (4, 4), (0, 0)), "symmetric")
    return raw(network, lr)[16:-16, 16:-16]


def assert_equal_but_for_rounding(sr, expected):
    difference = np.abs(np.int32(sr) - np.int32(np.rint(expected.clip(0, 255))))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


# ---- Tiles ----


@pytest.mark.parametrize(
    "height, width, tiles",
    [(1, 1, (768, 128)), (2, 50, (30, 7)), (70, 61, (43, 24)), (60, 40, (99, 21)), (97, 83, (20, 9))],
)
def test_tiles_are_exact(disturbed, height, width, tiles):
    lr = make_image(3)[:height, :width]
    sr = model.Upscaler(disturbed, tiles=tiles)(lr)
    assert sr.std() > 20 or sr.size < 100
    assert_equal_but_for_rounding(sr, mirrored(disturbed, lr))


@pytest.mark.parametrize("length", [1, 7, 100, 101, 250, 399])
@pytest.mark.parametrize("span", [(0, 1), (0.3, 0.9)])
def test_windows_have_one_size_and_reach_far_enough(length, span):
    side, halo = 40, 9
    start, stop = (int(share * length) for share in span)
    if start == stop:
        stop += 1
    parts = list(model.parts_and_windows(slice(start, stop), side, halo, slice(-4, length + 4)))
    assert len({window.stop - window.start for _, window in parts}) == 1
    covered = []
    for part, window in parts:
        covered += range(part.start, part.stop)
        assert part.stop - part.start <= side
        assert max(start - halo, -4) <= window.start <= max(part.start - halo, -4)
        assert min(part.stop + halo, length + 4) <= window.stop <= min(stop + halo, length + 4)
    assert covered == list(range(start, stop))


def test_the_border_of_a_white_page_stays_white():
    sr = model.Upscaler(model.load_generator(main.WEIGHTS))(np.full((24, 24, 3), 255, np.uint8))
    assert sr.min() >= 250  # 241 with zeros beyond the border


def test_a_large_image_brings_windows_of_one_shape_to_each_half_of_the_network(disturbed, monkeypatch):
    upscaler = model.Upscaler(disturbed, tiles=(40, 16))
    shapes = {"run_trunk": [], "run_tail": []}
    for name, found in shapes.items():
        half = getattr(upscaler, name)
        monkeypatch.setattr(upscaler, name, lambda x, half=half, found=found: found.append(x.shape) or half(x))
    upscaler(make_image(0, 128, 100))
    assert len(shapes["run_trunk"]) == 4 * 3
    assert len(set(shapes["run_trunk"])) == 1
    assert len(set(shapes["run_tail"])) <= 9  # at a corner, an edge, inside


def look_far(network, axis, end):
    """Let a generator take a part of each value from the farthest pixel that it reaches in one direction.

    Each convolution shifts the image by its radius, 16 blocks x + 10 shift(x) leave (10 / 11)^16 at full distance.
    """
    rgb = np.arange(3)
    for layer in network.layers:
        if isinstance(layer, (keras.layers.Conv2D, model.ShufflePReLUConv)):
            kernel = np.zeros(layer.kernel.shape)
            tap = [layer.kernel.shape[0] // 2] * 2
            tap[axis] = end
            for i in range(0, kernel.shape[3], 64):  # the up-convolutions have four times 64
                kernel[*tap, rgb, i + rgb] = 1
            layer.kernel.assign(kernel)
            layer.bias.assign(np.full(layer.bias.shape, -1.0 if layer.name == "tail" else 0.0))
        elif layer.name.endswith("norm2"):
            layer.gamma.assign(np.full(64, 10.0))
        elif layer.name == "trunk_norm":
            layer.gamma.assign(np.full(64, 11.0**-16))


def test_halos_are_enough_and_no_more_than_that(monkeypatch):
    network = model.generator()
    upscaler = model.Upscaler(network, tiles=(44, 20))
    for axis, end in ((0, 0), (0, -1), (1, 0), (1, -1)):
        look_far(network, axis, end)
        upscaler.load(network)
        lr = make_image(3, 8, 88) if axis == 0 else make_image(3, 88, 8)
        expected = mirrored(network, lr)
        assert_equal_but_for_rounding(upscaler(lr), expected)
        for name in ("TRUNK_HALO", "TAIL_HALO"):
            with monkeypatch.context() as patch:
                patch.setattr(model, name, getattr(model, name) - 1)
                assert np.abs(upscaler(lr) - expected.clip(0, 255)).max() > 2


@pytest.mark.parametrize("kind, scale", [(np.uint8, 1), (np.uint16, 257)])
def test_grey_stays_grey_and_the_rest_is_the_networks(disturbed, kind, scale):
    lr = make_image(1, 40, 30)
    grey = lr[..., :1].repeat(3, axis=2)
    upscaler = model.Upscaler(disturbed)
    expected = mirrored(disturbed, grey)
    assert np.ptp(expected, axis=-1).mean() > 1
    sr = upscaler(kind(grey) * kind(scale))
    assert sr.dtype == kind
    assert np.ptp(sr, axis=-1).max() == 0
    assert np.abs(sr[..., 0] / scale - expected.mean(-1).clip(0, 255)).max() < 0.51 / scale + 0.001
    np.testing.assert_array_equal(sr[..., :1], upscaler(kind(grey[..., :1]) * kind(scale)))

    lr[:-1] = grey[:-1]  # one row with colour
    sr = upscaler(kind(lr) * kind(scale))
    assert np.abs(sr / scale - mirrored(disturbed, lr).clip(0, 255)).max() < 0.51 / scale + 0.001


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_ensemble_is_the_mean_of_eight(disturbed, kind):
    lr = make_image(5, 50, 30).astype(kind)
    if kind == np.uint16:
        lr *= 257
    upscaler = model.Upscaler(disturbed, tiles=(32, 20))
    total = 0
    for mirror in (1, -1):
        for turn in range(4):
            turned = upscaler(np.rot90(lr[::mirror], turn))
            total = total + np.rot90(turned, -turn)[::mirror].astype(float)
    sr = model.Upscaler(disturbed, ensemble=True, tiles=(32, 20))(lr)
    assert sr.dtype == kind
    assert np.abs(sr - total / 8).max() <= 0.5


def test_an_upscaler_takes_new_weights(disturbed):
    lr = make_image(2, 30, 20)
    upscaler = model.Upscaler(model.generator(blocks=2))
    before = upscaler(lr)
    upscaler.load(disturbed)
    assert np.abs(before - mirrored(disturbed, lr)).mean() > 1
    assert_equal_but_for_rounding(upscaler(lr), mirrored(disturbed, lr))


# ---- Export ----


def load_exported(path):
    """A function from LR to SR that runs what --export wrote."""
    if path.suffix == ".onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(path)
        return lambda lr: session.run(None, {"lr": lr})[0]
    if path.suffix.lower() == ".tflite":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that tf.lite will be removed
            run = tf.lite.Interpreter(str(path)).get_signature_runner()
        return lambda lr: run(lr=lr)["output_0"]
    loaded = tf.saved_model.load(path)
    return lambda lr: loaded.serve(lr).numpy()  # and keeps `loaded`


@pytest.mark.parametrize("name", ["saved", "a.tflite", "A.TFLITE", "a.onnx"])
def test_exported_generator_computes_the_same(tmp_path, weights, name):
    if name == "a.onnx":
        pytest.importorskip("tf2onnx")
    if name != "saved":
        (tmp_path / name).write_text("an earlier export")
    assert run("--export", tmp_path / name, "--weights", weights, "--blend", 0.25) == 0
    assert os.listdir(tmp_path) == [name]
    srresnet = model.load_generator(weights.with_name("srresnet.weights.h5")).get_weights()
    mixed = model.load_generator(weights)
    mixed.set_weights([0.75 * a + 0.25 * b for a, b in zip(srresnet, mixed.get_weights())])
    exported = load_exported(tmp_path / name)
    rng = np.random.default_rng(0)
    for size in ((13, 22), (37, 9)):
        lr = np.float32(rng.integers(0, 2, (*size, 3)) * 255)
        sr = raw(mixed, lr)
        assert sr.min() < -1  # it leaves 0 to 255
        assert sr.max() > 256
        np.testing.assert_allclose(exported(lr[None])[0], sr.clip(0, 255), atol=0.01)


def test_the_readmes_tiles_of_an_exported_generator_are_exact(tmp_path):
    """Tiles with 40 more pixels where the image goes on, without 160 pixels of the result there."""
    assert run("--export", tmp_path / "a.tflite") == 0
    upscale = load_exported(tmp_path / "a.tflite")
    lr = np.float32(make_image(4, 92, 8)[None])
    whole = upscale(lr)
    left = upscale(lr[:, :, : 46 + 40])[:, :, : -160 or None]
    right = upscale(lr[:, :, 46 - 40 :])[:, :, 160:]
    np.testing.assert_allclose(np.concatenate([left, right], axis=2), whole, atol=0.01)


@pytest.mark.parametrize("number", [0, signal.SIGTERM])
def test_an_export_that_fails_leaves_what_was_there(tmp_path, weights, monkeypatch, capsys, number):
    def fail(network, path, *args, **kwargs):
        Path(path).write_text("half")
        os.kill(os.getpid(), number)
        raise tf.errors.ResourceExhaustedError(None, None, "disk full")

    target = tmp_path / "a.tflite"
    target.write_text("before")
    monkeypatch.setattr(keras.Model, "export", fail)
    argv = ["--export", target, "--weights", weights]
    if number:
        with pytest.raises(SystemExit, match="143"):
            run(*argv)
    else:
        assert refusal(capsys, *argv, started=True).startswith(f"main.py: can't write {target}: disk full")
    assert os.listdir(tmp_path) == ["a.tflite"]
    assert target.read_text() == "before"


def test_exports_that_are_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "folder.tflite").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("folder.tflite", "file"):
        path = tmp_path / name
        assert refusal(capsys, "--export", path) == f"main.py: --export {path} exists: give another name\n"
    for name in ("a.keras", "a.h5", "a.pb", ".tflite", "a.onnx."):
        line = refusal(capsys, "--export", tmp_path / name)
        assert line.startswith(f"main.py: --export {tmp_path / name} must end in .tflite or .onnx")
    monkeypatch.setattr(main.importlib.util, "find_spec", lambda name: None)
    line = refusal(capsys, "--export", tmp_path / "a.onnx")
    assert line == "main.py: exporting to ONNX needs a package that is not installed: pip install tf2onnx\n"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.tflite"]
