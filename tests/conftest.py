"""Small images with edges and texture, a VGG19 of random weights, and whole runs on them in processes of their own.

Nothing is read from outside the repository.
"""

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
from PIL import Image, ImageDraw


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
    """A `.weights.h5` of VGG19 up to block2_conv2, random."""
    import keras

    keras.utils.set_random_seed(0)
    vgg = keras.applications.VGG19(include_top=False, weights=None)
    path = tmp_path_factory.mktemp("vgg") / "vgg19.weights.h5"
    keras.Model(vgg.input, vgg.get_layer("block2_conv2").output).save_weights(path)
    return path


FLAGS = "--PREGENSTEPS 20 --STEPS 40 --save_every 2 --eval_every 10 --seed 3 --ema 0.9"


@pytest.fixture(scope="session")
def start(photos, tmp_path_factory):
    """`start(run_dir, flags, **options)` starts a training like `tiny.run` and returns its process.

    What the process prints is in the file `process.output`. It is forked from one that has imported TensorFlow.
    """
    import tiny

    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload(["tiny"])
    processes, folder = [], tmp_path_factory.mktemp("tiny")

    def start(run_dir, flags=FLAGS, **options):
        argv = ["--data_dir", str(photos), "--run_dir", str(run_dir), "--BATCH_SIZE", "4", *flags.split()]
        output = run_dir.with_suffix(f".{len(processes)}.log")
        output.touch()
        process = context.Process(target=tiny.run, args=(argv, folder, output), kwargs=options)
        process.output = output
        processes.append(process)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where to import tiny from
            process.start()
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


def start_workers(start, run_dir, count=2):
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        cluster = {"worker": [f"127.0.0.1:{each.getsockname()[1]}" for each in (one, other)]}
    return [
        start(run_dir, TF_CONFIG=json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}}))
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def runs(start, tmp_path_factory, vgg_weights):
    """A folder of runs, and the processes of each by its name."""
    folder, real = tmp_path_factory.mktemp("runs"), "--PREGENSTEPS 1 --STEPS 1 --vgg_layer block2_conv2"
    return folder, {
        "whole": [start(folder / "whole")],
        "real": [start(folder / "real", f"{real} --vgg_weights {vgg_weights}", real_networks=True)],
        "devices": [start(folder / "devices", devices=2)],
        "workers": start_workers(start, folder / "workers"),
    }


@pytest.fixture(scope="session", autouse=True)
def start_early(request):
    """Start the runs before the first test, if any test needs them: they keep the second core busy meanwhile."""
    if any("runs" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("runs")
