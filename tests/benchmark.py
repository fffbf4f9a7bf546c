"""Speed and memory of training, patches and upscaling, as a Markdown table: `python3 tests/benchmark.py`.

Each row is measured in a process of its own, so that its peak memory is its own, too. XLA takes up to a minute to
compile a training step for a GPU: there, all rows compile side by side, wait for one another, and are measured one at
a time.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import resource
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

import data
import main


def peak_memory():
    """Of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def random_pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def training(gpu, phase, batch_size):
    """Patches per second of training with `--recipe release`, its losses read after each call, as training does.

    The VGG19 has random weights. Batches come from the host's memory.
    """
    import keras
    import tensorflow as tf

    import losses
    import model
    import train

    found, args = [], main.parse(["--recipe", "release"])
    train.fit = lambda name, step, *rest: found.append(step)  # instead of training
    if phase == "pre-training":
        train.train_srresnet(model.generator(), None, None, args)
    else:
        with tempfile.NamedTemporaryFile(suffix=".weights.h5") as file:
            keras.applications.VGG19(include_top=False, weights=None).save_weights(file.name)
            vgg = losses.vgg_features(args.vgg_layer, file.name)
        train.train_srgan("gan", 100, 0, model.generator(), vgg, None, None, args)
    run, count = train.compiled(found[0])
    stack = (count, batch_size) if count > 1 else (batch_size,)
    batch = random_pixels(*stack, 24, 24), random_pixels(*stack, 96, 96)
    batches = iter(tf.data.Dataset.from_tensors(batch).repeat().prefetch(1))

    def call():
        scalars = run(*next(batches), tf.constant(0), tf.constant(count))
        [float(value) for value in scalars.values()]  # waits for the device

    call()
    with turn():
        _, _, *times = [seconds(call) for _ in range(22 if gpu else 10)]
    return count * batch_size / np.median(times), "patches/s"


def patches(gpu, data_dir, jpeg, batch_size):
    """Pairs of patches per second, of prepared images that have been read once.

    `data_dir`: images to read; None: twenty of 2 megapixels, made for the purpose. The memory counts the pages of the
    prepared images that the system happens to keep, and can drop again.
    """
    with tempfile.TemporaryDirectory() as folder:
        for i in range(0 if data_dir else 20):
            Image.fromarray(random_pixels(1152, 1728)).save(Path(folder) / f"{i}.bmp")
        images, _ = data.load(data_dir or folder, None if data_dir else folder)
        [hr.max() for _, hr in images]  # now in memory as far as it fits
        batches = iter(data.patches(images, batch_size, 0, 9_999_999, seed=0, jpeg=jpeg))
        with turn():
            times = [seconds(partial(next, batches)) for _ in range(320)]
        return batch_size / np.mean(times[20:]), "patches/s"


def upscaling(gpu, width, height):
    """Megapixels of the result per second: the best of three after a first; of large images on a CPU, the first."""
    import model

    run = partial(model.make_upscaler(model.generator()), random_pixels(height, width))
    several = gpu or width < 1000
    if several:
        run()
    with turn():
        best = min(seconds(run) for _ in range(3 if several else 1))
    return data.SCALE**2 * height * width / best / 1e6, "megapixels/s"


def rows(data_dir, batch_sizes):
    """The table: name, precision, function and its arguments."""
    precisions = ("float32", "bfloat16")
    for phase, precision, size in itertools.product(("pre-training", "GAN"), precisions, batch_sizes):
        yield f"{phase}, {precision}, batch {size}", precision, training, phase, size
    for name, jpeg in (("patches", None), ("patches, half of them JPEG", "60-95")):
        yield name, "float32", patches, data_dir, jpeg, batch_sizes[-1]
    for (width, height), precision in itertools.product(((480, 270), (1920, 1080)), precisions):
        yield f"upscaling {width}x{height}, {precision}", precision, upscaling, width, height


def share(*objects):
    """Give a new process the barrier and the lock."""
    global READY, LOCK
    READY, LOCK = objects


@contextlib.contextmanager
def turn():
    """Wait until all processes are ready, then let one at a time go on."""
    with contextlib.suppress(threading.BrokenBarrierError):  # one failed, or takes too long
        READY.wait(timeout=150)
    with LOCK:
        yield


def measure(gpu, name, precision, function, *arguments):
    """Returns a line of the table."""
    if function is not upscaling:
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as main.py does
    main.start_tensorflow(precision)
    import tensorflow as tf

    try:
        speed, unit = function(gpu, *arguments)
    except Exception as error:
        READY.abort()
        traceback.print_exc()
        return f"| {name} | {type(error).__name__} | | |"
    device = f"{tf.config.experimental.get_memory_info('GPU:0')['peak'] / 1e6:,.0f} MB" if gpu else ""
    return f"| {name} | {speed:,.{0 if speed > 100 else 1}f} {unit} | {peak_memory():,.0f} MB | {device} |"


def run(args):
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        machine = pool.submit(main.start_tensorflow).result()
    gpu = not machine.startswith("CPU")
    batch_sizes = [args.BATCH_SIZE] if args.BATCH_SIZE else [16, 128] if gpu else [16]
    todo = [row for row in rows(args.data_dir, batch_sizes) if args.only in row[0]]
    jobs = args.jobs or (len(todo) if gpu else 1)
    print(f"{machine}, TensorFlow {version('tensorflow')}", "| | speed | memory | GPU memory |", sep="\n\n")
    print("|---|---|---|---|", flush=True)
    for group in (todo[i : i + jobs] for i in range(0, len(todo), jobs)):
        with ProcessPoolExecutor(len(group), spawn, share, (spawn.Barrier(len(group)), spawn.Lock())) as pool:
            for line in [pool.submit(measure, gpu, *row) for row in group]:
                print(line.result(), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--BATCH_SIZE", type=int, help="patches in a step (default: 16; on a GPU, also 128)")
    parser.add_argument("--data_dir", help="images to cut patches from, instead of made ones")
    parser.add_argument("--only", default="", help="the rows whose names hold this")
    parser.add_argument("--jobs", type=int, help="rows to prepare at once (default: 1; on a GPU, all)")
    run(parser.parse_args())
