"""Speed and memory of training, the data pipeline and upscaling, as a table: `python3 tests/benchmark.py`.

Each row is measured in a process of its own, so that its peak memory is its own, too.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
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


def training(phase, precision, xla, batch_size, steps=10):
    """Patches per second of a training step: the median after three others, of which the first compiles.

    The VGG19 of the GAN ends at block3_conv4; its weights are random.
    """
    import keras
    import tensorflow as tf

    import losses
    import model
    import train

    train.compiled = partial(train.compiled, xla=xla)
    lr = tf.constant(np.random.default_rng(0).integers(0, 256, (batch_size, 24, 24, 3), np.uint8))
    hr = tf.constant(np.random.default_rng(0).integers(0, 256, (batch_size, 96, 96, 3), np.uint8))
    generator = model.generator(precision)
    optimizer = train.make_optimizer(1e-4, generator)
    if phase == "pre-training":
        step = train.make_pretrain_step(generator, optimizer)
    else:
        with tempfile.TemporaryDirectory() as folder:
            vgg = keras.applications.VGG19(include_top=False, weights=None)
            vgg = keras.Model(vgg.input, vgg.get_layer("block3_conv4").output)
            vgg.save_weights(f"{folder}/random.weights.h5")
            vgg = losses.vgg_features("block3_conv4", f"{folder}/random.weights.h5", precision)
        discriminator = model.discriminator(precision)
        step = train.make_gan_step(generator, discriminator, vgg, optimizer, train.make_optimizer(1e-4, discriminator))
    seconds = []
    for _ in range(3 + steps):
        start = time.perf_counter()
        [float(value) for value in step(lr, hr).values()]  # waits for the device
        seconds.append(time.perf_counter() - start)
    row = {"speed": batch_size / np.median(seconds[3:]), "unit": "patches/s", "first step (s)": seconds[0]}
    if tf.config.list_physical_devices("GPU"):
        row["GPU memory (MB)"] = tf.config.experimental.get_memory_info("GPU:0")["peak"] / 1e6
    return row


def patches(data_dir, jpeg, batch_size, seconds=5):
    """Patch pairs per second out of `data.patches` from a prepared store that has been read once.

    `data_dir`: images to read; None: twenty of 2 megapixels, made for the purpose. The memory counts the pages of the
    store that the system happens to keep, and can drop again.
    """
    with tempfile.TemporaryDirectory() as folder:
        if data_dir is None:
            data.FOLDER, data_dir = Path(folder) / "data", folder
            for i in range(20):
                image = np.random.default_rng(i).integers(0, 256, (1152, 1728, 3), np.uint8)
                Image.fromarray(image).save(Path(folder) / f"{i}.bmp")
        images, _ = data.load(data_dir)
        [hr.max() for _, hr in images]  # now in memory as far as it fits
        batches = iter(data.patches(images, batch_size, 0, sys.maxsize - 1, seed=0, jpeg=jpeg))
        for _ in itertools.islice(batches, 20):
            pass
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            next(batches)
            count += batch_size
        return {"speed": count / (time.perf_counter() - start), "unit": "patches/s"}


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


def upscaling(height, width, precision):
    """Megapixels of the result per second: the best of three for small images, after one that traces."""
    import model

    upscaler = model.make_upscaler(model.generator(precision))
    lr = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    seconds = []
    for _ in range(4 if height * width < 10**6 else 1):
        start = time.perf_counter()
        upscaler(lr)
        seconds.append(time.perf_counter() - start)
    speed = data.SCALE**2 * height * width / min(seconds) / 1e6
    return {"speed": speed, "unit": "megapixels/s", "tiling overhead": tiling_overhead(height, width)}


def measure(function, *arguments):
    """In a fresh process. Returns the row."""
    if function is training:
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as main.py sets it
    main.start_tensorflow()
    row = function(*arguments)
    return {**row, "memory (MB)": peak_memory()}


def machine():
    name = main.start_tensorflow()
    with open("/proc/cpuinfo") if Path("/proc/cpuinfo").exists() else open(os.devnull) as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return f"{name} ({names[0] if names else platform.machine()}), TensorFlow {version('tensorflow')}"


def rows(args):
    """The table: name, function and its arguments."""
    for phase in ("pre-training", "GAN"):
        for precision in ("float32", "bfloat16"):
            for xla in (False, True):
                name = f"{phase}, {precision}{', XLA' if xla else ''}"
                yield name, training, phase, precision, xla, args.BATCH_SIZE
    yield "patches", patches, args.data_dir, None, args.BATCH_SIZE
    yield "patches, half of them JPEG", patches, args.data_dir, "30-95", args.BATCH_SIZE
    for width, height in ((128, 128), (480, 270), (1920, 1080)):
        for precision in ("float32", "bfloat16"):
            yield f"upscaling {width}x{height}, {precision}", upscaling, height, width, precision


def run(args):
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        result = {"machine": pool.apply(machine), "batch size": args.BATCH_SIZE, "rows": []}
        print(
            f"{result['machine']}; batches of {args.BATCH_SIZE}\n\n| | speed | peak memory | |\n|---|---|---|---|",
            flush=True,
        )
        for name, *call in rows(args):
            if args.only not in name:
                continue
            row = pool.apply(measure, call)
            result["rows"].append({"name": name, **row})
            speed, unit, memory = row.pop("speed"), row.pop("unit"), row.pop("memory (MB)")
            notes = "; ".join(f"{key} {value:.{2 if value < 1 else 0}f}" for key, value in row.items())
            digits = 0 if speed > 100 else 2 if speed < 10 else 1
            print(f"| {name} | {speed:,.{digits}f} {unit} | {memory:,.0f} MB | {notes} |", flush=True)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--BATCH_SIZE", type=int, default=16, metavar="N", help="patches in a step")
    parser.add_argument("--data_dir", metavar="DIR", help="images to read instead of made ones")
    parser.add_argument("--only", default="", metavar="TEXT", help="the rows whose names hold this")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    run(parser.parse_args())
