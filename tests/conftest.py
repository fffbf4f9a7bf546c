"""Small images with edges and texture, a VGG19 of random weights, and trainings with them."""

import multiprocessing
import os
import signal
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as in training
os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where other processes find `tiny`

import keras
import numpy as np
import pytest
import tiny
from PIL import Image, ImageDraw

import main

FLAGS = "--BATCH_SIZE 4 --PREGENSTEPS 23 --STEPS 34 --save_every 4 --eval_every 10 --seed 3 --ema 0.7"
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
HANDLERS = {number: signal.getsignal(number) for number in STOPPING}


def make_image(seed, width=128, height=112):
    """An RGB image of smooth colour, shapes with sharp edges, and fine texture."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 32
    waves = [np.sin(a * x + b * y + c) for a, b, c in rng.uniform(-2, 2, (3, 3))]
    image = Image.fromarray(np.uint8(128 + 60 * np.stack(waves, -1)))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x0, y0, w, h = rng.integers(0, [width, height, width // 2, height // 2])
        shape = draw.ellipse if rng.integers(2) else draw.rectangle
        shape((x0, y0, x0 + w, y0 + h), fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
    noisy = np.asarray(image) + rng.normal(0, 4, (height, width, 3))
    return np.uint8(noisy.clip(0, 255))


def run(*argv):
    return main.main([str(word) for word in argv])


def refusal(capsys, *argv, started=False):
    """Run the program, which must fail with one line on stderr, after or before TensorFlow was started. Returns it."""
    capsys.readouterr()
    try:
        code = run(*argv)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code in (1, 2)
    assert printed.err.count("\n") == 1, printed
    assert ("Running on" in printed.out) == started, printed
    return printed.err


def training(photos, run_dir, *more):
    """The command line of a training. Of a flag that is given twice, the last holds."""
    folders = ["--data_dir", photos, "--cache_dir", photos.with_name("cache"), "--run_dir", run_dir]
    return [str(word) for word in (*folders, *FLAGS.split(), *more)]


@pytest.fixture(autouse=True)
def restored():
    """What the program sets for its process is reset after each test."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder with `train/` and `valid/`."""
    folder = tmp_path_factory.mktemp("photos")
    for part, seeds in (("train", range(4)), ("valid", range(4, 6))):
        (folder / part).mkdir()
        for seed in seeds:
            Image.fromarray(make_image(seed)).save(folder / part / f"{seed}.png")
    return folder


@pytest.fixture(scope="session")
def vgg_weights(tmp_path_factory):
    """A file of VGG19 with random weights."""
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg19.weights.h5"
    keras.applications.VGG19(include_top=False, weights=None).save_weights(path)
    return path


@pytest.fixture(scope="session")
def start(photos):
    """`start(run_dir, *flags, **options)` starts a training in a process of its own, like `tiny.run`, and returns it.

    What the process prints is in the file `process.output`. It is forked from one that has imported TensorFlow.
    """
    processes = []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny"])

    def start(run_dir, *flags, **options):
        output = run_dir.with_suffix(f".{len(processes)}.log")
        output.touch()
        argv = training(photos, run_dir, *flags)
        process = context.Process(target=tiny.run, args=(argv, output), kwargs=options)
        process.output = output
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture(scope="session")
def begun(start, tmp_path_factory):
    """The process of a training of tiny networks that nothing disturbs."""
    return start(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="session")
def whole(begun):
    """The folder of this training when it has ended, and what it printed."""
    begun.join()
    assert begun.exitcode == 0
    return begun.output.with_name("run"), begun.output.read_text()
