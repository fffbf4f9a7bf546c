"""Speed and memory, measured: `python3 tests/benchmark.py [--data_dir DIR]`."""

import argparse
import itertools
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

import data


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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    print(
        f"data: {speed:,.0f} pairs/s in batches of {batch_size}{f', JPEG {jpeg}' if jpeg else ''}; "
        f"{len(pictures)} pictures, {pictures.pixels.nbytes / 1e6:.0f} MB, prepared in {prepared:.1f} s "
        f"and found again in {found:.2f} s; peak memory {peak:.0f} MB"
    )
    return speed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", metavar="DIR", help="pictures to read instead of made ones")
    args = parser.parse_args()
    data_pipeline(args.data_dir)
    data_pipeline(args.data_dir, jpeg=(30, 95))
