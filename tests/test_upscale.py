"""Running the generator over images of any size, and the modes --pretrained, --evaluate and --export."""

import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_image
from PIL import Image

import data
import losses
import main
import model

ROOT = Path(main.__file__).resolve().parent


def disturb(network, seed=0):
    """Random statistics and gammas: a fresh generator is an interpolation, which looks at few pixels."""
    rng = np.random.default_rng(seed)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.2, 0.4, 64), *rng.normal(0, 0.05, (2, 64)), rng.uniform(0.5, 1.5, 64)])
    tail = network.get_layer("tail")
    tail.kernel.assign_add(rng.normal(0, 0.001, tail.kernel.shape))


@pytest.fixture(scope="module")
def network():
    keras.utils.set_random_seed(0)
    network = model.generator()
    disturb(network)
    return network


@pytest.fixture(scope="module")
def small_network():
    """The same with two residual blocks, which takes a fraction of the time."""
    keras.utils.set_random_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "BLOCKS", 2)
        network = model.generator()
    disturb(network)
    return network


@pytest.fixture(scope="module")
def small_weights(tmp_path_factory):
    """A folder with the weights of a fresh generator of two blocks, and of one that differs a little."""
    folder = tmp_path_factory.mktemp("weights")
    keras.utils.set_random_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "BLOCKS", 2)
        network = model.generator()
    network.save_weights(folder / "srgan.weights.h5")
    tail = network.get_layer("tail")
    tail.kernel.assign(0.8 * tail.kernel)
    network.save_weights(folder / "srresnet.weights.h5")
    return folder


@pytest.fixture
def weights(small_weights, monkeypatch):
    """The same folder; generators have two blocks."""
    monkeypatch.setattr(model, "BLOCKS", 2)
    return small_weights


@functools.cache
def compiled(network):
    return tf.function(
        lambda x: model.LocalLimits()(network(x, training=False), x),
        input_signature=[tf.TensorSpec((1, None, None, 3), tf.float32)],
    )


def whole(network, lr):
    """The image upscaled in one piece: `(h, w, 3)` to float32 `(4h, 4w, 3)`, not clipped."""
    return compiled(network)(tf.constant(lr[None], tf.float32))[0].numpy()


def assert_equal_but_for_rounding(sr, expected):
    difference = np.abs(np.int32(sr) - np.int32(np.rint(expected.clip(0, 255))))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


# ---------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("halo", [3, 40])
def test_tiles_own_every_pixel_once_and_keep_their_halo(halo):
    rng = np.random.default_rng(0)
    for _ in range(300):
        length, tile = int(rng.integers(1, 600)), int(rng.integers(2 * halo + 1, 300))
        tiles = model.cover(length, tile, halo)
        assert [low for _, _, low, _ in tiles] == [0] + [high for *_, high in tiles[:-1]] and tiles[-1][3] == length
        assert len({size for _, size, _, _ in tiles}) == 1 and tiles[0][1] <= max(tile, 1)
        for start, size, low, high in tiles:
            assert 0 <= start and start + size <= length and low < high
            assert start == 0 or low - start >= halo
            assert start + size == length or start + size - high >= halo


@pytest.mark.parametrize(
    "size, tiles", [((1, 1), (768, 128)), ((2, 50), (81, 7)), ((70, 101), (90, 24)), ((90, 60), (768, 40))]
)
def test_tiles_are_exact(network, size, tiles):
    lr = make_image(3)[: size[0], : size[1]]
    sr = model.make_upscaler(network, False, *tiles)(lr)
    assert sr.std() > 20 or sr.size < 100
    assert_equal_but_for_rounding(sr, whole(network, lr))


@pytest.fixture(scope="module")
def trained():
    return model.load_generator([main.WEIGHTS / "srgan.weights.h5"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_random_tiles_are_exact_on_trained_weights(trained, seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 350, 2)
    upscaler = model.make_upscaler(trained, False, int(rng.integers(81, 300)), int(rng.integers(7, 150)))
    lr = make_image(seed, 400, 400)[:height, :width]
    assert_equal_but_for_rounding(upscaler(lr), whole(trained, lr))


def reaching(corner):
    """A generator that takes a part of each value from the farthest pixel that it can reach, towards a corner (0, -1).

    Each convolution shifts the image by its radius, 16 blocks x + 10 shift(x) leave (10 / 11)^16 at full distance.
    """
    network = model.generator()
    rgb = np.arange(3)
    for layer in network.layers:
        if isinstance(layer, (keras.layers.Conv2D, model.ShufflePReLUConv)):
            kernel, bias = np.zeros(layer.kernel.shape), np.zeros(layer.bias.shape)
            for i in range(0, kernel.shape[3], 64):  # the up-convolutions have four times 64
                kernel[corner, corner, rgb, i + rgb] = 1
            layer.kernel.assign(kernel)
            layer.bias.assign(bias - 1 if layer.name == "tail" else bias)
        elif layer.name.endswith("norm2") or layer.name == "trunk_norm":
            gamma = np.full(64, 10.0 if layer.name != "trunk_norm" else 11.0**-16)
            layer.set_weights([gamma, *layer.get_weights()[1:]])
    return network


@pytest.mark.parametrize("corner", [0, -1])
def test_halos_are_enough_and_no_more_than_that(monkeypatch, corner):
    monkeypatch.setattr(model.LocalLimits, "call", lambda self, sr, lr: sr)  # a shifted image is far beyond them
    network, lr = reaching(corner), make_image(3, 88, 86)
    upscaler = model.make_upscaler(network, False, 84, 20)
    expected = whole(network, lr)
    assert_equal_but_for_rounding(upscaler(lr), expected)
    for name in ("TRUNK_HALO", "TAIL_HALO"):
        with monkeypatch.context() as patch:
            patch.setattr(model, name, getattr(model, name) - 1)
            assert np.abs(upscaler(lr) - expected.clip(0, 255)).max() > 2


def test_flat_areas_stay_flat():
    """The network darkens the rim of a white page by 16 grey levels."""
    network = model.load_generator([main.WEIGHTS / "srgan.weights.h5"])
    white = np.full((48, 48, 3), 255, np.uint8)
    assert network(white[None].astype(np.float32)).numpy().min() < 245
    assert model.make_upscaler(network)(white).min() >= 253


def test_grey_areas_stay_grey_and_colours_stay(small_network):
    lr = make_image(1, 40, 30)
    lr[:, :20] = lr[:, :20, :1]
    raw = small_network(lr[None].astype(np.float32))[0].numpy()
    sr = model.make_upscaler(small_network)(lr)
    colourfulness = np.ptp(sr.astype(int), axis=-1)
    assert np.ptp(raw[:, :72], axis=-1).mean() > 1 and colourfulness[:, :72].max() == 0
    limit = np.ptp(lr[:, 20:].astype(int), axis=-1).max() * 1.5
    assert 20 < colourfulness[:, 88:].mean() and colourfulness.max() <= limit + 1


def test_bfloat16_is_close(network):
    lr = make_image(2, 24, 16)
    mixed = model.generator("bfloat16")
    mixed.set_weights(network.get_weights())
    difference = np.int32(model.make_upscaler(mixed)(lr)) - model.make_upscaler(network)(lr)
    assert 0 < np.abs(difference).mean() < 2


def test_grey_and_16_bit_follow_the_network(small_network):
    grey = make_image(1, 40, 30)[..., :1]
    expected = whole(small_network, grey.repeat(3, axis=2)).mean(axis=-1, keepdims=True)
    upscaler = model.make_upscaler(small_network)
    assert_equal_but_for_rounding(upscaler(grey), expected)
    deep = upscaler(np.uint16(grey) * 257)
    assert deep.dtype == np.uint16
    assert np.abs(deep / 257 - expected.clip(0, 255)).max() < 0.1


def test_ensemble_is_the_mean_of_eight(small_network):
    lr = make_image(5, 84, 40)
    total = 0
    for mirrored in (False, True):
        view = lr[::-1] if mirrored else lr
        for turn in range(4):
            sr = np.rot90(whole(small_network, np.rot90(view, turn)), -turn)
            total = total + (sr[::-1] if mirrored else sr)
    assert_equal_but_for_rounding(model.make_upscaler(small_network, True, 82, 30)(lr), total / 8)


def test_progress_adds_up(weights):
    network = model.load_generator([weights / "srgan.weights.h5"])
    for ensemble in (False, True):
        done = []
        model.make_upscaler(network, ensemble, 90, 30)(make_image(0, 95, 12), done.append)
        assert len(done) > 4 and sum(done) == pytest.approx(95 * 12)


def test_out_of_memory_is_named(small_network, monkeypatch):
    def exhausted(*tensors):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    monkeypatch.setattr(tf, "function", lambda *_, **__: exhausted)
    with pytest.raises(MemoryError, match="out of memory: close"):
        model.make_upscaler(small_network)(np.zeros((8, 8, 3), np.uint8))


def test_blend_is_between_the_weights(weights):
    blended, a, b = model.generator(), model.generator(), model.generator()
    model.load_blend(blended, weights / "srresnet.weights.h5", weights / "srgan.weights.h5", 0.25)
    model.load_weights(a, weights / "srresnet.weights.h5")
    model.load_weights(b, weights / "srgan.weights.h5")
    for x, y, z in zip(blended.get_weights(), a.get_weights(), b.get_weights()):
        np.testing.assert_allclose(x, 0.75 * y + 0.25 * z, atol=1e-6)


# -------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def places(tmp_path, weights, monkeypatch):
    """A current folder with an image, links to it, and what is in the way."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 20)).save("a.png")
    os.mkfifo("fifo.jpg")
    Image.new("L", (16_400, 1)).save("long.png")
    os.symlink("a.png", "link.png")
    os.link("a.png", "hard.png")
    Path("bad.png").write_bytes(Path("a.png").read_bytes()[:20])
    Path("text.txt").write_text("text")
    for folder in ("folder", "empty", "scores/HR", "scores/LR_x4", "folder.png", "folder.tflite"):
        Path(folder).mkdir(parents=True)
    Image.new("RGB", (30, 20)).save("folder/a.png")
    Image.new("RGB", (32, 32)).save("scores/HR/a.png")
    Image.new("RGB", (8, 8)).save("scores/LR_x4/b.png")
    Path("srresnet.weights.h5").write_text("not read")
    return weights / "srgan.weights.h5"


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--input nowhere.png", "no such image or folder: nowhere.png"),
        ("--input bad.png --output b.png", "bad.png"),
        ("--input text.txt --output b.png", "text.txt"),
        ("--input a.png --output a.png", "never overwritten"),
        ("--input a.png --output ./folder/../a.png", "never overwritten"),
        ("--input a.png --output link.png", "never overwritten"),
        ("--input link.png --output a.png", "never overwritten"),
        ("--input a.png --output hard.png", "never overwritten"),
        ("--input a.png --output b.xyz", "ends in one of .bmp .jpeg .jpg .png .tif .tiff .webp"),
        ("--input a.png --output b.gif", "ends in one of"),
        ("--input a.png --output b", "ends in one of"),
        ("--input a.png --output folder.png", "it is a folder"),
        ("--input a.png --output text.txt/b.png", "text.txt is read-only or not a folder"),
        ("--input long.png --output b.jpg", "more than the 65,500 pixels a side of a JPEG"),
        ("--input long.png --output b.webp", "more than the 16,383 pixels a side of a WEBP"),
        ("--input folder", "--output must be a folder, too"),
        ("--input folder --output text.txt", "--output must be a folder, too"),
        ("--input folder --output folder", "never overwritten"),
        ("--input folder --output text.txt/out", "text.txt is read-only or not a folder"),
        ("--input empty --output out", "empty"),
        ("--input a.png --output b.png --weights nowhere.weights.h5", "no such weights file: nowhere.weights.h5"),
        ("--input a.png --output b.png --weights text.txt", "must end in .weights.h5"),
        ("--evaluate nowhere", "no such folder: nowhere"),
        ("--evaluate text.txt", "no such folder: text.txt"),
        ("--evaluate empty", "empty"),
        ("--evaluate scores", "LR_x4"),
        ("--evaluate folder --json text.txt/s.json", "text.txt is read-only or not a folder"),
        ("--evaluate folder --json empty", "it is a folder"),
        ("--evaluate folder --json folder/a.png", "must end in .json"),
        ("--input fifo.jpg --output b.png", "fifo.jpg: it is not a regular file"),
        ("--input a.png --output b.png --blend 0.5 --weights srresnet.weights.h5", "--blend mixes"),
        ("--export folder", "with files that are not a SavedModel"),
        ("--export a.png", "a.png is read-only or not a folder"),
        ("--export folder.tflite", "it is a folder"),
    ],
)
def test_refused_before_any_work(places, capsys, argv, message):
    before = sorted(os.listdir("."))
    argv = argv.split() + ([] if "--weights" in argv else ["--weights", str(places)])
    assert main.main(argv if argv[0] in main.MODES else ["--pretrained", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(os.listdir(".")) == before


def test_a_read_only_folder_is_refused(places, capsys, monkeypatch):
    argv = ["--pretrained", "--input", "a.png", "--output", "b.bmp", "--weights", str(places)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        assert main.main(argv) == 2
    assert "read-only" in capsys.readouterr().err


def test_images_in_a_folder_get_names_of_their_own(tmp_path):
    for name in ("a.png", "a.gif", "b.jpg", "._b.jpg"):
        (tmp_path / name).touch()
    jobs = main.find_jobs(tmp_path, tmp_path / "out")
    assert [(source.name, target.name) for source, target in jobs] == [
        ("a.gif", "a.gif.png"), ("a.png", "a.png"), ("b.jpg", "b.jpg"),
    ]  # fmt: skip
    (tmp_path / "a.gif.png").touch()
    with pytest.raises(ValueError, match="rename one of them"):
        main.find_jobs(tmp_path, tmp_path / "out")


def test_links_to_originals_in_the_output_folder(tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").touch()
    (tmp_path / "links" / "b.png").symlink_to(tmp_path / "out" / "a.png")
    (tmp_path / "links" / "a.png").touch()
    with pytest.raises(ValueError, match="out/a.png is in --input, by a link, and never overwritten"):
        main.find_jobs(tmp_path / "links", tmp_path / "out")


def run(*argv):
    return main.main([str(word) for word in argv])


def test_a_folder_of_images(tmp_path, weights, capsys):
    source, target = tmp_path / "in", tmp_path / "new" / "out"
    source.mkdir()
    image = make_image(2, 30, 20)
    for suffix in ("png", "jpg", "webp", "bmp", "tif", "gif"):
        Image.fromarray(image).save(source / f"{suffix}.{suffix}")
    (source / "bad.png").write_bytes(b"not an image")
    (source / "notes.txt").write_text("not read")
    argv = ["--pretrained", "--input", source, "--output", target, "--weights", weights / "srgan.weights.h5"]
    assert run(*argv) == 1
    errors = capsys.readouterr().err.replace("\r", "\n").split("\n")
    bad, total = (line for line in errors if line.startswith("main.py:"))
    assert str(source / "bad.png") in bad and total == "main.py: 1 of 7 images failed"
    expected = ["bmp.bmp", "gif.gif.png", "jpg.jpg", "png.png", "tif.tif", "webp.webp"]
    assert sorted(path.name for path in target.iterdir()) == expected
    bicubic = data.bicubic(image)
    for path in target.iterdir():
        sr = data.read_rgb(path)
        assert sr.shape == (80, 120, 3)
        assert losses.psnr(sr, bicubic) > (
            35 if path.suffix in (".png", ".bmp", ".tif") and path.stem != "gif.gif" else 20
        )


def test_names_by_default(tmp_path, weights, monkeypatch):
    """input.jpg to output.jpg in the current folder."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(make_image(0, 24, 16)).save("input.jpg", quality=95)
    assert run("--pretrained", "--weights", weights / "srgan.weights.h5", "--ensemble", "--blend", 0.5) == 0
    with Image.open("output.jpg") as image:
        assert image.size == (96, 64) and image.format == "JPEG"
        assert image.layer[0][1:3] == image.layer[1][1:3] == (1, 1)  # 4:4:4
    assert sorted(os.listdir()) == ["input.jpg", "output.jpg"]


def test_weights_that_do_not_fit_are_one_line(places, capsys):
    Path("other.weights.h5").write_text("not HDF5")
    assert run("--pretrained", "--input", "a.png", "--output", "b.png", "--weights", "other.weights.h5") == 1
    error = capsys.readouterr().err
    assert "other.weights.h5" in error and error.count("\n") == 1 and not Path("b.png").exists()


# ------------------------------------------------------------------------------------------------------------- export


def saved_model(path):
    loaded = tf.saved_model.load(path)
    return lambda lr: loaded.serve(lr).numpy()  # and keeps `loaded`


def interpreter(path):
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        Interpreter = tf.lite.Interpreter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tf.lite will be removed
        run = Interpreter(str(path)).get_signature_runner()
    return lambda lr: run(lr=lr)["output_0"]


def onnx_session(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return lambda lr: session.run(None, {"lr": lr})[0]


@pytest.fixture(scope="module")
def lrs():
    """Two images of odd sizes, whose results leave 0 to 255. The left of one is grey."""
    rng = np.random.default_rng(0)
    lrs = [np.float32(rng.integers(0, 2, (1, *size, 3)) * 255) for size in ((13, 22), (37, 9))]
    lrs[0][:, :, :11] = lrs[0][:, :, :11, :1]
    return lrs


@pytest.fixture
def blended_srs(weights, lrs):
    paths = [weights / "srresnet.weights.h5", weights / "srgan.weights.h5"]
    blended = model.load_generator(paths, 0.25)
    return [model.LocalLimits()(blended(lr), lr).numpy() for lr in lrs]


@pytest.mark.parametrize("name", ["saved_model", "a.tflite", "a.onnx"])
def test_exported_generator_computes_the_same(tmp_path, weights, lrs, blended_srs, name):
    if name == "a.onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("tf2onnx")
    path = tmp_path / name
    if name == "saved_model":  # one that is there is replaced
        path.mkdir()
        (path / "saved_model.pb").touch()
    assert run("--export", path, "--weights", weights / "srgan.weights.h5", "--blend", 0.25) == 0
    assert os.listdir(tmp_path) == [name]
    load = {"": saved_model, ".tflite": interpreter, ".onnx": onnx_session}
    exported = load[path.suffix](path)
    for lr, sr in zip(lrs, blended_srs):
        assert sr.min() < -1 and sr.max() > 256
        np.testing.assert_allclose(exported(lr), sr.clip(0, 255), atol=0.5)


def test_onnx_without_its_package_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(main.importlib.util, "find_spec", lambda name: None)
    assert run("--export", tmp_path / "a.onnx") == 2
    assert "pip install tf2onnx" in capsys.readouterr().err


def test_failed_export_leaves_what_was_there(tmp_path, weights, monkeypatch, capsys):
    def fail(network, path, *args, **kwargs):
        Path(path).write_text("half")
        raise tf.errors.ResourceExhaustedError(None, None, "disk full")

    (tmp_path / "a.tflite").write_text("before")
    monkeypatch.setattr(keras.Model, "export", fail)
    assert run("--export", tmp_path / "a.tflite", "--weights", weights / "srgan.weights.h5") == 1
    assert "disk full" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a.tflite"] and (tmp_path / "a.tflite").read_text() == "before"


# ------------------------------------------------------------------------------------------------------------- scores


def make_benchmark(folder, with_lr):
    (folder / "HR").mkdir(parents=True)
    (folder / "LR_x4").mkdir()
    for seed in range(2):
        hr = make_image(seed, 96, 80)
        Image.fromarray(hr).save(folder / "HR" / f"{seed}.png")
        if with_lr:
            Image.fromarray(data.degrade(hr)).save(folder / "LR_x4" / f"{seed}x4.png")
    return folder if with_lr else folder / "HR"


def test_pairs_by_name(tmp_path):
    """The same name goes before the name with x4."""
    for name in ("HR/box4.png", "HR/bo.png", "HR/a.png", "LR_x4/box4.png", "LR_x4/bo.jpg", "LR_x4/ax4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    lrs = [(name, lr.name) for name, _, lr in data.scoring_pairs(tmp_path)]
    assert lrs == [("a", "ax4.png"), ("bo", "bo.jpg"), ("box4", "box4.png")]


def test_scores(tmp_path, weights, capsys):
    made = {}
    for with_lr in (True, False):
        folder = make_benchmark(tmp_path / str(with_lr), with_lr)
        scores = tmp_path / "new" / f"{with_lr}.json"
        assert run("--evaluate", folder, "--json", scores, "--weights", weights / "srgan.weights.h5") == 0
        made[with_lr] = json.loads(scores.read_text())
        table = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [row[0] for row in table[3:]] == ["0", "1", "mean"]
    assert made[True] == made[False]
    folder, sr, file = tmp_path / "True", tmp_path / "sr", weights / "srgan.weights.h5"
    assert run("--pretrained", "--input", folder / "LR_x4", "--output", sr, "--weights", file) == 0
    expected = {"bicubic": [], "model": []}
    for name, hr, lr in data.scoring_pairs(folder):
        lr, hr = data.read_pair(hr, lr)
        for kind, image in (("bicubic", data.bicubic(lr)), ("model", data.read_rgb(sr / f"{name}x4.png"))):
            expected[kind].append((losses.psnr(image, hr), losses.ssim(image, hr)))
    for kind, scores in expected.items():
        assert list(made[True][kind].values()) == pytest.approx(np.mean(scores, axis=0))


def test_evaluation_goes_on_after_a_bad_image(tmp_path, weights, capsys):
    folder = make_benchmark(tmp_path / "set", False)
    (folder / "0.png").write_bytes((folder / "1.png").read_bytes()[:99])
    scores = tmp_path / "scores.json"
    scores.write_text("before")
    assert run("--evaluate", folder, "--json", scores, "--weights", weights / "srgan.weights.h5") == 1
    printed = capsys.readouterr()
    assert str(folder / "0.png") in printed.err and "mean of 1" in printed.out
    assert scores.read_text() == "before"  # a mean of fewer images is not the set's


def test_scores_are_written_whole_or_not_at_all(tmp_path, weights, monkeypatch):
    folder = make_benchmark(tmp_path / "set", False)
    scores = tmp_path / "scores.json"
    scores.write_text("before")

    def full(path, text):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert run("--evaluate", folder, "--json", scores, "--weights", weights / "srgan.weights.h5") == 1
    assert scores.read_text() == "before" and sorted(os.listdir(tmp_path)) == ["scores.json", "set"]


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_100_megapixels_in_bounded_memory(tmp_path, mode):
    image = Image.fromarray(make_image(0, 500, 500)).resize((2500, 2500)).convert(mode)
    image.save(tmp_path / "a.png")
    argv = ["--pretrained", "--input", "a.png", "--output", "b.png"]
    code = "import main, sys; from benchmark import peak_memory; print(main.main(sys.argv[1:]), peak_memory())"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split()[-2] == "0", done.stderr
    assert float(done.stdout.split()[-1]) < 2500  # MB
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(tmp_path / "b.png") as image:
        assert image.size == (10_000, 10_000) and image.mode == mode
