"""Small images with edges and texture, and a VGG19 of random weights: nothing is read from outside the repository."""

import os

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
