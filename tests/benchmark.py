"""Speed and memory, measured: `python3 tests/benchmark.py [--data_dir DIR]`."""

import argparse
import itertools
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as main.py sets it
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

import data


def peak_memory():
    """Of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def data_pipeline(data_dir=None, jpeg=None, batch_size=128, seconds=5):
    """Patch pairs per second out of `data.patches` from a prepared store that has been read once, and the peak memory.

    `data_dir`: pictures to read; None: twenty of 2 megapixels, made for the purpose. Memory is that of the whole
    process, with TensorFlow; it counts the pages of the store that the system happens to keep, and can drop again.
    """
    with tempfile.TemporaryDirectory() as folder:
        if data_dir is None:
            data.FOLDER, data_dir = Path(folder) / "data", folder
            for i in range(20):
                picture = np.random.default_rng(i).integers(0, 256, (1152, 1728, 3), np.uint8)
                Image.fromarray(picture).save(Path(folder) / f"{i}.bmp")
        start = time.perf_counter()
        pictures, _ = data.load(data_dir)
        prepared = time.perf_counter() - start
        start = time.perf_counter()
        data.load(data_dir)
        found = time.perf_counter() - start

        pictures.pixels.max()  # now in memory as far as it fits
        batches = iter(data.patches(pictures, batch_size, 0, sys.maxsize - 1, seed=0, jpeg=jpeg))
        for _ in itertools.islice(batches, 20):
            pass
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            next(batches)
            count += batch_size
        speed = count / (time.perf_counter() - start)
    print(
        f"data: {speed:,.0f} pairs/s in batches of {batch_size}{f', JPEG {jpeg}' if jpeg else ''}; "
        f"{len(pictures)} pictures, {pictures.pixels.nbytes / 1e6:.0f} MB, prepared in {prepared:.1f} s "
        f"and found again in {found:.2f} s; peak memory {peak_memory():.0f} MB"
    )
    return speed


def training(batch_size=16, steps=5):
    """Patches per second of both training steps: the median of a few steps, after the one that compiles."""
    import keras
    import tensorflow as tf

    import losses
    import model
    import train

    lr = tf.constant(np.random.default_rng(0).integers(0, 256, (batch_size, 24, 24, 3), np.uint8))
    hr = tf.constant(np.random.default_rng(0).integers(0, 256, (batch_size, 96, 96, 3), np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "random.weights.h5"
        vgg = keras.applications.VGG19(include_top=False, weights=None)
        keras.Model(vgg.input, vgg.get_layer("block2_conv2").output).save_weights(weights)
        vgg = losses.vgg_features("block2_conv2", weights)
    for precision in ("float32", "bfloat16"):
        generator, discriminator = model.generator(precision), model.discriminator(precision)
        optimizers = [train.make_optimizer(1e-4, network) for network in (generator, discriminator)]
        for name, step in (
            ("pre-training", train.make_pretrain_step(generator, train.make_optimizer(1e-4, generator))),
            ("GAN, block2_conv2", train.make_gan_step(generator, discriminator, vgg, *optimizers)),
        ):
            seconds = []
            for _ in range(steps + 1):
                start = time.perf_counter()
                [float(value) for value in step(lr, hr).values()]  # waits for the device
                seconds.append(time.perf_counter() - start)
            print(
                f"{name}, {precision}: {batch_size / np.median(seconds[1:]):.1f} patches/s in batches of {batch_size}; "
                f"compiled in {seconds[0]:.1f} s; peak memory {peak_memory():.0f} MB"
            )


def tiling_overhead(height, width, trunk_tile=768, tail_tile=128):
    """The arithmetic that tiles spend on overlap, as a part of what one piece takes."""
    import model

    trunk, tail = 9 * 9 * 3 * 64 + 33 * 9 * 64 * 64, 5 * 9 * 64 * 256 + 4 * 25 * 256 * 12  # multiplications a pixel
    total = 0
    for tile, part in model.grid(height, width, trunk_tile, model.TRUNK_HALO + model.TAIL_HALO):
        total += trunk * model.area(tile)
        rows, columns = (
            min(p.stop + model.TAIL_HALO, t.stop) - max(p.start - model.TAIL_HALO, t.start) for t, p in zip(tile, part)
        )
        total += tail * sum(model.area(inner) for inner, _ in model.grid(rows, columns, tail_tile, model.TAIL_HALO))
    return total / ((trunk + tail) * height * width) - 1


def upscaling(sizes=((128, 128), (270, 480), (1080, 1920))):
    """LR megapixels per second, the tiling's overhead and the peak memory, size by size: a list of rows."""
    import model

    upscaler = model.make_upscaler(model.generator())
    rows = []
    for height, width in sizes:
        lr = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        times = []
        for _ in range(4 if height * width < 10**6 else 1):  # the first of a small one includes tracing
            start = time.perf_counter()
            upscaler(lr)
            times.append(time.perf_counter() - start)
        rows.append((height, width, height * width / min(times) / 1e6, tiling_overhead(height, width), peak_memory()))
        print(
            f"upscaling {width}x{height}: {rows[-1][2]:.4f} LR megapixels/s, {rows[-1][3]:.1%} of overhead in tiles; "
            f"peak memory {rows[-1][4]:.0f} MB",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", metavar="DIR", help="pictures to read instead of made ones")
    args = parser.parse_args()
    data_pipeline(args.data_dir)
    data_pipeline(args.data_dir, jpeg=(30, 95))
    upscaling()
    training()
