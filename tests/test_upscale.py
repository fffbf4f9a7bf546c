"""Running the generator over pictures of any size, and the modes of --pretrained and --evaluate."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_picture
from PIL import Image

import data
import losses
import main
import model

ROOT = Path(main.__file__).resolve().parent
SHARED = ROOT.parent / "shared"


def nearest(lr, progress=None):
    """Stands for the network where only files matter."""
    return lr.repeat(4, axis=0).repeat(4, axis=1)


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
def weights(tmp_path_factory):
    """A folder with the weights of a fresh generator, and of one that differs a little."""
    folder = tmp_path_factory.mktemp("weights")
    keras.utils.set_random_seed(0)
    network = model.generator()
    network.save_weights(folder / "srgan.weights.h5")
    tail = network.get_layer("tail")
    tail.kernel.assign(0.8 * tail.kernel)
    network.save_weights(folder / "srresnet.weights.h5")
    return folder


@functools.cache
def compiled(network):
    return tf.function(
        lambda x: network(x, training=False), input_signature=[tf.TensorSpec((1, None, None, 3), tf.float32)]
    )


def whole(network, lr):
    """The network on the picture in one piece: `(h, w, 3)` to float32 `(4h, 4w, 3)`, not clipped."""
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
    lr = make_picture(3)[: size[0], : size[1]]
    sr = model.make_upscaler(network, False, *tiles)(lr)
    assert sr.std() > 20 or sr.size < 100
    assert_equal_but_for_rounding(sr, whole(network, lr))


@pytest.fixture(scope="module")
def trained(network):
    """The weights of the repository, or else random ones."""
    for path in sorted((ROOT / "weights").glob("sr*.weights.h5")):
        trained = model.generator()
        model.load_weights(trained, path)
        return trained
    return network


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_random_tiles_are_exact_on_trained_weights(trained, seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 350, 2)
    upscaler = model.make_upscaler(trained, False, int(rng.integers(81, 300)), int(rng.integers(7, 150)))
    lr = make_picture(seed, 400, 400)[:height, :width]
    assert_equal_but_for_rounding(upscaler(lr), whole(trained, lr))


def reaching(corner):
    """A generator that takes a part of each value from the farthest pixel that it can reach, towards a corner (0, -1).

    Each convolution shifts the picture by its radius, 16 blocks x + 10 shift(x) leave (10 / 11)^16 at the full distance.
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
    network, lr = reaching(corner), make_picture(3, 110, 95)
    upscaler = model.make_upscaler(network, False, 90, 20)
    expected = whole(network, lr)
    assert_equal_but_for_rounding(upscaler(lr), expected)
    for name in ("TRUNK_HALO", "TAIL_HALO"):
        with monkeypatch.context() as patch:
            patch.setattr(model, name, getattr(model, name) - 1)
            assert np.abs(upscaler(lr) - expected.clip(0, 255)).max() > 2


def test_grey_and_16_bit_follow_the_network(network):
    grey = make_picture(1, 40, 30)[..., :1]
    expected = whole(network, grey.repeat(3, axis=2)).mean(axis=-1, keepdims=True)
    upscaler = model.make_upscaler(network)
    assert_equal_but_for_rounding(upscaler(grey), expected)
    deep = upscaler(np.uint16(grey) * 257)
    assert deep.dtype == np.uint16
    assert np.abs(deep / 257 - expected.clip(0, 255)).max() < 0.1


def test_ensemble_is_the_mean_of_eight(network):
    lr = make_picture(5, 98, 60)
    total = 0
    for mirrored in (False, True):
        view = lr[::-1] if mirrored else lr
        for turn in range(4):
            sr = np.rot90(whole(network, np.rot90(view, turn)), -turn)
            total = total + (sr[::-1] if mirrored else sr)
    assert_equal_but_for_rounding(model.make_upscaler(network, True, 90, 30)(lr), total / 8)


def test_progress_adds_up(network):
    for ensemble in (False, True):
        done = []
        model.make_upscaler(network, ensemble, 90, 30)(make_picture(0, 95, 12), done.append)
        assert len(done) > 4 and sum(done) == pytest.approx(95 * 12)


def test_blend_is_between_the_weights(weights, network):
    blended, a, b = model.generator(), model.generator(), model.generator()
    model.load_blend(blended, weights / "srresnet.weights.h5", weights / "srgan.weights.h5", 0.25)
    model.load_weights(a, weights / "srresnet.weights.h5")
    model.load_weights(b, weights / "srgan.weights.h5")
    for x, y, z in zip(blended.get_weights(), a.get_weights(), b.get_weights()):
        np.testing.assert_allclose(x, 0.75 * y + 0.25 * z, atol=1e-6)


# -------------------------------------------------------------------------------------------------- the command line


def run(*argv, code=0, cwd=None):
    """main.py in a process of its own: its output and errors. Fails on another exit code, or a traceback."""
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", *map(str, argv)], cwd=cwd, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def test_a_folder_of_pictures(tmp_path, weights):
    source, target = tmp_path / "in", tmp_path / "new" / "out"
    source.mkdir()
    picture = make_picture(2, 30, 20)
    for suffix in ("png", "jpg", "webp", "bmp", "tif", "gif"):
        Image.fromarray(picture).save(source / f"{suffix}.{suffix}")
    (source / "bad.png").write_bytes(b"not a picture")
    (source / "notes.txt").write_text("not taken")
    argv = ["--pretrained", "--input", source, "--output", target, "--weights", weights / "srgan.weights.h5"]
    _, errors = run(*argv, code=1)
    assert [line for line in errors.replace("\r", "\n").split("\n") if line.startswith("main.py:")] == [
        f"main.py: {source / 'bad.png'} is not a picture",
        "main.py: 1 of 7 pictures failed",
    ]
    assert sorted(path.name for path in target.iterdir()) == [
        "bmp.bmp",
        "gif.png",
        "jpg.jpg",
        "png.png",
        "tif.tif",
        "webp.webp",
    ]
    bicubic = data.bicubic(picture)
    for path in target.iterdir():
        sr = data.read_rgb(path)
        assert sr.shape == (80, 120, 3)
        assert losses.psnr(sr, bicubic) > (35 if path.suffix in (".png", ".bmp", ".tif") and path.stem != "gif" else 20)


def test_names_by_default(tmp_path, weights):
    """input.jpg to output.jpg in the current folder."""
    Image.fromarray(make_picture(0, 24, 16)).save(tmp_path / "input.jpg", quality=95)
    run("--pretrained", "--weights", weights / "srgan.weights.h5", "--ensemble", "--blend", 0.5, cwd=tmp_path)
    with Image.open(tmp_path / "output.jpg") as image:
        assert image.size == (96, 64) and image.format == "JPEG"
        assert image.layer[0][1:3] == image.layer[1][1:3] == (1, 1)  # 4:4:4
    assert sorted(os.listdir(tmp_path)) == ["input.jpg", "output.jpg"]


@pytest.fixture
def places(tmp_path, weights, monkeypatch):
    """A current folder with a picture, links to it, and what is in the way."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 20)).save("a.png")
    Image.new("L", (16_400, 1)).save("long.png")
    os.symlink("a.png", "link.png")
    os.link("a.png", "hard.png")
    Path("bad.png").write_bytes(Path("a.png").read_bytes()[:20])
    Path("text.txt").write_text("text")
    for folder in ("folder", "empty", "scores/HR", "scores/LR_x4", "folder.png"):
        Path(folder).mkdir(parents=True)
    Image.new("RGB", (30, 20)).save("folder/a.png")
    Image.new("RGB", (32, 32)).save("scores/HR/a.png")
    Image.new("RGB", (8, 8)).save("scores/LR_x4/b.png")
    return weights / "srgan.weights.h5"


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--input nowhere.png", "no such picture or folder: nowhere.png"),
        ("--input bad.png --output b.png", "bad.png is not a picture"),
        ("--input text.txt --output b.png", "text.txt is not a picture"),
        ("--input a.png --output a.png", "never overwritten"),
        ("--input a.png --output ./folder/../a.png", "never overwritten"),
        ("--input a.png --output link.png", "never overwritten"),
        ("--input link.png --output a.png", "never overwritten"),
        ("--input a.png --output hard.png", "never overwritten"),
        ("--input a.png --output b.xyz", "ends in one of .bmp .jpeg .jpg .png .tif .tiff .webp"),
        ("--input a.png --output b.gif", "ends in one of"),
        ("--input a.png --output b", "ends in one of"),
        ("--input a.png --output folder.png", "it is a folder"),
        ("--input a.png --output nowhere/b.png", "there is no folder nowhere"),
        ("--input long.png --output b.jpg", "more than the 65,500 pixels a side of a JPEG"),
        ("--input long.png --output b.webp", "more than the 16,383 pixels a side of a WEBP"),
        ("--input folder", "give a folder as --output"),
        ("--input folder --output text.txt", "give a folder as --output"),
        ("--input folder --output folder", "never overwritten"),
        ("--input folder --output text.txt/out", "read-only, or no folder"),
        ("--input empty --output out", "no pictures in empty"),
        ("--input a.png --output b.png --weights nowhere.weights.h5", "no such weights file: nowhere.weights.h5"),
        ("--input a.png --output b.png --weights text.txt", "ends in .weights.h5"),
        ("--evaluate nowhere", "no such folder: nowhere"),
        ("--evaluate text.txt", "no such folder: text.txt"),
        ("--evaluate empty", "no pictures in empty"),
        ("--evaluate scores", "has no LR picture of that name"),
        ("--evaluate folder --json nowhere/s.json", "can't write nowhere/s.json"),
        ("--evaluate folder --input a.png", "--input goes with --pretrained"),
    ],
)
def test_refused_before_any_work(places, capsys, argv, message):
    before = sorted(os.listdir("."))
    argv = argv.split() + ([] if "--weights" in argv else ["--weights", str(places)])
    with pytest.raises(SystemExit) as error:
        main.parse(argv if "--evaluate" in argv else ["--pretrained", *argv])
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert sorted(os.listdir(".")) == before


def test_read_only_folder_and_full_disk_are_refused(places, capsys, monkeypatch):
    argv = ["--pretrained", "--input", "a.png", "--output", "b.bmp", "--weights", str(places)]
    main.parse(argv)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        pytest.raises(SystemExit, main.parse, argv)
    assert "read-only" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(data.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        pytest.raises(SystemExit, main.parse, argv)
    assert "too little" in capsys.readouterr().err


def test_gif_does_not_take_a_png_s_name(places):
    for name in ("x.gif", "x.png", "y.gif"):
        Image.new("L", (5, 5)).save(Path("folder", name))
    args = main.parse(["--pretrained", "--input", "folder", "--output", "out", "--weights", str(places)])
    assert [target.name for _, target in args.jobs] == ["a.png", "x.gif.png", "x.png", "y.png"]


def test_weights_that_do_not_fit_are_one_line(places, capsys):
    Path("other.weights.h5").write_text("not HDF5")
    argv = ["--pretrained", "--input", "a.png", "--output", "b.png", "--weights", "other.weights.h5"]
    assert main.main(argv) == 1
    said = capsys.readouterr().err
    assert "other.weights.h5" in said and said.count("\n") == 1 and not Path("b.png").exists()


# ------------------------------------------------------------------------------------------------------------ scores


def make_benchmark(folder, with_lr):
    (folder / "HR").mkdir(parents=True)
    (folder / "LR_x4").mkdir()
    for seed in range(2):
        hr = make_picture(seed, 96, 80)
        Image.fromarray(hr).save(folder / "HR" / f"{seed}.png")
        if with_lr:
            Image.fromarray(data.degrade(hr)).save(folder / "LR_x4" / f"{seed}x4.png")
    return folder if with_lr else folder / "HR"


def test_scores(tmp_path, weights, capsys):
    made = {}
    for with_lr in (True, False):
        folder = make_benchmark(tmp_path / str(with_lr), with_lr)
        argv = ["--evaluate", folder, "--json", tmp_path / "scores.json", "--weights", weights / "srgan.weights.h5"]
        assert main.evaluate(main.parse([str(word) for word in argv])) == 0
        made[with_lr] = json.loads((tmp_path / "scores.json").read_text())
        table = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [row[0] for row in table[2:]] == ["0", "1", "mean"]
    assert made[True] == made[False]
    pairs = [data.read_pair(hr, lr) for _, hr, lr in data.scoring_pairs(tmp_path / "True")]
    expected = np.mean([losses.psnr(data.bicubic(lr), hr) for lr, hr in pairs])
    assert made[True]["bicubic"]["psnr"] == pytest.approx(expected)
    assert made[True]["model"]["psnr"] == pytest.approx(expected, abs=1)


def test_sizes_that_do_not_go_together_are_one_line(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "hr.png")
    Image.new("RGB", (11, 10)).save(tmp_path / "lr.png")
    with pytest.raises(ValueError, match="is 11x10, and a quarter of .* is 10x10"):
        data.read_pair(tmp_path / "hr.png", tmp_path / "lr.png")


@pytest.mark.skipif(not (SHARED / "tools" / "score.py").exists(), reason="needs the benchmarks")
def test_scores_agree_with_the_independent_tool(tmp_path, weights):
    folder = SHARED / "data" / "Set5"
    argv = ["--evaluate", folder, "--json", tmp_path / "s.json", "--weights", weights / "srgan.weights.h5"]
    args = main.parse([str(word) for word in argv])
    main.evaluate(args)
    scores = json.loads((tmp_path / "s.json").read_text())
    upscaler = main.load_upscaler(args)
    (tmp_path / "sr").mkdir()
    for path in data.list_images(folder / "LR_x4"):
        main.upscale_image(upscaler, path, tmp_path / "sr" / path.name)
    for name, argv in {"bicubic": ["--bicubic", folder / "LR_x4"], "model": [tmp_path / "sr"]}.items():
        tool = [sys.executable, SHARED / "tools" / "score.py", *map(str, argv), str(folder / "HR"), "--json"]
        theirs = json.loads(subprocess.run(tool, capture_output=True, text=True, check=True).stdout)
        assert scores[name]["psnr"] == pytest.approx(theirs["psnr"], abs=0.005)
        assert scores[name]["ssim"] == pytest.approx(theirs["ssim"], abs=0.0005)
    assert scores["bicubic"]["psnr"] == pytest.approx(28.43, abs=0.01)


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_100_megapixels_in_bounded_memory(tmp_path, weights, mode):
    picture = Image.fromarray(make_picture(0, 500, 500)).resize((2500, 2500)).convert(mode)
    picture.save(tmp_path / "a.png")
    argv = ["--pretrained", "--input", "a.png", "--output", "b.png", "--weights", str(weights / "srgan.weights.h5")]
    code = "import main, resource, sys; code = main.main(sys.argv[1:]); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) * 1024 < 2.5e9
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(tmp_path / "b.png") as image:
        assert image.size == (10_000, 10_000) and image.mode == mode
