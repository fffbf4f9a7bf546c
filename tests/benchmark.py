"""Speed and memory of training, patches, upscaling and folders, as a Markdown table: `python3 tests/benchmark.py`.

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

PHOTO = Path(main.__file__).with_name("assets") / "raccoon.jpg"


def peak_memory():
    """Of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def random_pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# ---- What is measured ----


def training(gpu, phase, batch_size):
    """Patches per second of training with `--recipe release`, its losses read after each call, as training does.

    The VGG19 has random weights. Batches come from the host's memory.
    """
    import keras
    import tensorflow as tf

    import losses
    import model
    import train

    args = main.parse(["--recipe", "release"])
    if phase == "pre-training":
        step = train.srresnet_phase(model.generator(), args).step
    else:
        with tempfile.NamedTemporaryFile(suffix=".weights.h5") as file:
            keras.applications.VGG19(include_top=False, weights=None).save_weights(file.name)
            vgg = losses.vgg_features(args.vgg_layer, file.name)
        step = train.srgan_phase("gan", 100, 0, model.generator(), vgg, args).step
    run, count = train.compile_step(step)
    stack = (batch_size,)
    if count > 1:
        stack = (count, batch_size)
    batch = random_pixels(*stack, 24, 24), random_pixels(*stack, 96, 96)
    batches = iter(tf.data.Dataset.from_tensors(batch).repeat().prefetch(1))

    def call():
        scalars = run(*next(batches), tf.constant(0), tf.constant(count))
        for value in scalars.values():
            float(value)  # waits for the device

    call()
    with turn():
        times = [seconds(call) for _ in range(22 if gpu else 10)]
    return count * batch_size / np.median(times[2:]), "patches/s"


def patches(gpu, data_dir, jpeg, batch_size):
    """Pairs of patches per second, of prepared images that have been read once.

    `data_dir`: images to read; None: twenty of 2 megapixels, made for the purpose. The memory counts the pages of the
    prepared images that the system happens to keep, and can drop again.
    """
    with tempfile.TemporaryDirectory() as folder:
        cache = None
        if data_dir is None:
            data_dir = cache = folder
            for i in range(20):
                Image.fromarray(random_pixels(1152, 1728)).save(Path(folder) / f"{i}.bmp")
        images, _ = data.load(data_dir, cache)
        for _, hr in images:
            hr.max()  # now in memory as far as it fits
        batches = iter(data.patches(images, batch_size, 0, 9_999_999, seed=0, jpeg=jpeg))
        with turn():
            times = [seconds(partial(next, batches)) for _ in range(320)]
        return batch_size / np.mean(times[20:]), "patches/s"


def upscaling(gpu, width, height):
    """Megapixels of the result per second: the best of three after a first; of large images on a CPU, the first."""
    import model

    run = partial(model.Upscaler(model.generator()), random_pixels(height, width))
    times = 1
    if gpu or width < 1000:
        times = 3
        run()
    with turn():
        best = min(seconds(run) for _ in range(times))
    return data.SCALE**2 * height * width / best / 1e6, "megapixels/s"


def one_convolution():
    """The least that can stand in for the generator, to see what the program itself costs."""
    import keras
    from keras import layers

    lr = keras.Input((None, None, 3))
    x = layers.Conv2D(48, 3, padding="same", name="trunk")(lr)
    return keras.Model(lr, keras.ops.depth_to_space(x, 4))


def folder(gpu, network, suffix):
    """Images per second of a folder of 32, details of 480x270 of a photograph, from files to files.

    With the generator on a CPU, the folder has four.
    """
    import model

    networks = {"generator": model.generator, "one convolution": one_convolution}
    upscaler = model.Upscaler(networks[network]())
    upscaler(random_pixels(270, 480))
    with tempfile.TemporaryDirectory() as place, Image.open(PHOTO) as photo, open(os.devnull, "w") as nowhere:
        jobs = []
        for i in range(4 if network == "generator" and not gpu else 32):
            left = 16 * i
            top = 15 * i
            path = Path(place) / f"{i}{suffix}"
            photo.crop((left, top, left + 480, top + 270)).save(path, quality=95)
            jobs.append(main.Job(path, Path(place) / f"large{i}{suffix}"))
        with turn(), contextlib.redirect_stdout(nowhere):
            duration = seconds(partial(main.upscale_all, jobs, upscaler))
    return len(jobs) / duration, "images/s"


# ---- The table ----


def rows(data_dir, batch_sizes):
    """The table: name, precision, function and its arguments."""
    precisions = ("float32", "bfloat16")
    for phase, precision, size in itertools.product(("pre-training", "GAN"), precisions, batch_sizes):
        yield f"{phase}, {precision}, batch {size}", precision, training, phase, size
    for name, jpeg in (("patches", None), ("patches, half of them JPEG", "60-95")):
        yield name, "float32", patches, data_dir, jpeg, batch_sizes[-1]
    for (width, height), precision in itertools.product(((480, 270), (1920, 1080)), precisions):
        yield f"upscaling {width}x{height}, {precision}", precision, upscaling, width, height
    for network, suffix in itertools.product(("generator", "one convolution"), (".png", ".jpg")):
        yield f"folder, {suffix} to {suffix}, {network}", "bfloat16", folder, network, suffix


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
    if function is training:
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as main.py does
    start_tensorflow(precision)
    import tensorflow as tf

    try:
        speed, unit = function(gpu, *arguments)
    except Exception as error:
        READY.abort()
        traceback.print_exc()
        return f"| {name} | {type(error).__name__} | | |"
    digits = 0 if speed > 100 else 1
    device = ""
    if gpu:
        device = f"{tf.config.experimental.get_memory_info('GPU:0')['peak'] / 1e6:,.0f} MB"
    return f"| {name} | {speed:,.{digits}f} {unit} | {peak_memory():,.0f} MB | {device} |"


def start_tensorflow(precision="float32"):
    """Returns the device's name, instead of printing it."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        main.start_tensorflow(precision)
    return main.device_names()


def run(args):
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        name = pool.submit(start_tensorflow).result()
    gpu = name != "CPU"
    batch_sizes = [16, 128] if gpu else [16]
    if args.BATCH_SIZE:
        batch_sizes = [args.BATCH_SIZE]
    todo = [row for row in rows(args.data_dir, batch_sizes) if args.only in row[0]]
    jobs = args.jobs or (len(todo) if gpu else 1)
    print(f"{name}, TensorFlow {version('tensorflow')}", "| | speed | memory | GPU memory |", sep="\n\n")
    print("|---|---|---|---|", flush=True)
    for start in range(0, len(todo), jobs):
        group = todo[start : start + jobs]
        shared = spawn.Barrier(len(group)), spawn.Lock()
        with ProcessPoolExecutor(len(group), spawn, share, shared) as pool:
            lines = [pool.submit(measure, gpu, *row) for row in group]
            for line in lines:
                print(line.result(), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--BATCH_SIZE", type=int, help="patches in a step (default: 16; on a GPU, also 128)")
    parser.add_argument("--data_dir", help="images to cut patches from, instead of made ones")
    parser.add_argument("--only", default="", help="the rows whose names hold this")
    parser.add_argument("--jobs", type=int, help="rows to prepare at once (default: 1; on a GPU, all)")
    run(parser.parse_args())
