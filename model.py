"""The two networks of SRGAN (Ledig et al. 2017, section 2.1 and Figure 4); upscaling images of any size; export.

Images are RGB, NHWC, 0 to 255; each network rescales them internally. With Keras's policy `mixed_bfloat16`, the layers
of the generator that touch the image stay float32: bfloat16's 8 significant bits would shift colours by a grey level.
"""

import collections
import itertools
import math
import shutil
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from tqdm import tqdm

SCALE = 4
BLOCKS = 16  # the generator's residual blocks


# ---- Layers ----


class BatchNormalization(layers.BatchNormalization):
    """Keras's, with TensorFlow's fused kernel in training: one pass over the features instead of a dozen.

    On two cores, a pre-training step in bfloat16 takes 0.85 of the time it takes with Keras's. The moving variance is
    unbiased: it divides by n - 1.
    """

    def call(self, x, training=False):
        if not training or self.synchronized:  # there is no fused kernel over several devices
            return super().call(x, training=training)
        y, mean, variance = tf.compat.v1.nn.fused_batch_norm(x, self.gamma, self.beta, epsilon=self.epsilon)
        self.moving_mean.assign(self.moving_mean * self.momentum + mean * (1 - self.momentum))
        self.moving_variance.assign(self.moving_variance * self.momentum + variance * (1 - self.momentum))
        return y


def normalization(**kwargs):
    """Batch normalisation by the statistics of the whole batch, also if several devices share it."""
    several_devices = tf.distribute.get_strategy().num_replicas_in_sync > 1
    return BatchNormalization(momentum=0.99, epsilon=1e-5, synchronized=several_devices, **kwargs)


class ShufflePReLUConv(layers.Layer):
    """The last pixel shuffle, PReLU and 9x9 convolution of Figure 4: `(batch, h, w, 256)` to `(batch, 2h, 2w, 3)`.

    It equals three plain lines, and a training step takes 0.84 of their time:

        x = tf.nn.depth_to_space(x, 2)
        x = tf.where(x > 0, x, alpha * x)
        x = tf.nn.conv2d(x, kernel, 1, "SAME") + bias

    A convolution from 64 channels to 3 uses 3 of a processor's 8 or 16 SIMD lanes. Before the pixel shuffle, it becomes
    a 5x5 convolution from 256 channels to 12: the 9x9 kernel is padded to 10x10 in four ways, one for each pixel of a
    2x2 block, and split into 5x5 taps of 2x2 values.
    """

    def build(self, shape):
        self.alpha = self.add_weight(name="alpha", shape=(64,), initializer=keras.initializers.Constant(0.25))
        self.kernel = self.add_weight(name="kernel", shape=(9, 9, 64, 3))
        self.bias = self.add_weight(name="bias", shape=(3,), initializer="zeros")

    def call(self, x):
        x = tf.where(x > 0, x, tf.tile(self.alpha, [4]) * x)
        x = tf.nn.conv2d(x, self.kernel_before_shuffle(), 1, "SAME") + tf.tile(self.bias, [4])
        return tf.nn.depth_to_space(x, 2)

    def kernel_before_shuffle(self):
        ways = []
        for top, left in itertools.product((0, 1), repeat=2):
            ways.append(tf.pad(self.kernel, [[top, 1 - top], [left, 1 - left], [0, 0], [0, 0]]))
        kernel = tf.concat(ways, axis=3)  # (10, 10, 64, 12)
        # For rows, the tap and the place in its 2x2 block; the same for columns; in; out.
        kernel = tf.reshape(kernel, (5, 2, 5, 2, 64, 12))
        return tf.reshape(tf.transpose(kernel, (0, 2, 1, 3, 4, 5)), (5, 5, 256, 12))


# ---- Networks ----


def generator(blocks: int = BLOCKS) -> keras.Model:
    """SRResNet: 16 residual blocks at LR resolution, then two pixel shuffles (Figure 4, top).

    `(batch, height, width, 3)` in, `(batch, 4 * height, 4 * width, 3)` out, float32, of any size. Values may leave 0 to
    255 a little: clip when the image is made. A fresh one upscales like an interpolation (`start_as_interpolation`).
    `blocks` may be fewer, for tests, but not more: the halos of tiles are reckoned for 16.
    """
    conv = partial(layers.Conv2D, padding="same")
    prelu = partial(layers.PReLU, shared_axes=[1, 2], alpha_initializer=keras.initializers.Constant(0.25))

    lr = keras.Input((None, None, 3), name="lr")
    x = layers.Rescaling(1 / 255, dtype="float32", name="unit")(lr)  # [0, 1]
    x = conv(64, 9, dtype="float32", name="head_conv")(x)
    x = prelu(name="head_prelu")(x)
    head = x
    for i in range(1, blocks + 1):
        y = conv(64, 3, name=f"block{i}_conv1")(x)
        y = normalization(name=f"block{i}_norm1")(y)
        y = prelu(name=f"block{i}_prelu")(y)
        y = conv(64, 3, name=f"block{i}_conv2")(y)
        y = normalization(gamma_initializer="zeros", name=f"block{i}_norm2")(y)
        x = layers.Add(name=f"block{i}")([x, y])
    x = conv(64, 3, name="trunk_conv")(x)
    x = normalization(gamma_initializer="zeros", name="trunk_norm")(x)
    x = layers.Add(name="trunk")([head, x])  # (batch, h, w, 64)

    x = conv(256, 3, name="up1_conv")(x)
    x = keras.ops.depth_to_space(x, 2)  # (batch, 2h, 2w, 64)
    x = prelu(name="up1_prelu")(x)
    x = conv(256, 3, name="up2_conv")(x)
    x = ShufflePReLUConv(name="tail", dtype="float32")(x)  # (batch, 4h, 4w, 3), [-1, 1]
    sr = layers.Rescaling(127.5, 127.5, dtype="float32", name="sr")(x)

    model = keras.Model(lr, sr, name="generator")
    start_as_interpolation(model)
    return model


def start_as_interpolation(model: keras.Model) -> None:
    """Let channels 0 to 2 carry the image from end to end, so that training starts at bicubic's PSNR.

    That is 28.5 dB on Set5. After ten minutes on two cores, SRResNet has 29.68 dB with this start, 25.88 without it.
    """
    # The residual branches end in a gamma of 0. The up-convolutions get the taps of a quadratic interpolation at -1/4
    # and, mirrored, +1/4 of a pixel, one phase for each output of the pixel shuffle.
    rgb = np.arange(3)
    taps = np.array([5, 30, -3]) / 32
    weights = {weight.path: weight.numpy() for weight in model.weights}
    weights["head_conv/kernel"][..., rgb] = 0
    weights["head_conv/kernel"][4, 4, rgb, rgb] = 1
    for name in ("up1_conv/kernel", "up2_conv/kernel"):
        for phase, (rows, columns) in enumerate(itertools.product((taps, taps[::-1]), repeat=2)):
            weights[name][..., 64 * phase + rgb] = 0
            weights[name][:, :, rgb, 64 * phase + rgb] = np.outer(rows, columns)[..., None]
    weights["tail/kernel"][:] = 0
    weights["tail/kernel"][4, 4, rgb, rgb] = 2  # [0, 1] to [-1, 1]
    weights["tail/bias"][:] = -1
    for name in ("head_prelu/alpha", "up1_prelu/alpha", "tail/alpha"):
        weights[name][..., rgb] = 1  # linear
    model.set_weights(list(weights.values()))


def discriminator() -> keras.Model:
    """The discriminator for 96x96 patches (Figure 4, bottom): `(batch, 96, 96, 3)` in, `(batch, 1)` logits out."""
    hr = keras.Input((96, 96, 3), name="hr")
    x = layers.Rescaling(1 / 127.5, -1)(hr)  # [-1, 1]
    for i, filters in enumerate((64, 64, 128, 128, 256, 256, 512, 512)):
        x = layers.Conv2D(filters, 3, strides=1 + i % 2, padding="same", name=f"conv{i + 1}")(x)
        if i > 0:
            x = normalization(name=f"norm{i + 1}")(x)
        x = layers.LeakyReLU(0.2)(x)
    x = layers.Flatten()(x)  # 6 * 6 * 512
    x = layers.Dense(1024, name="dense1")(x)
    x = layers.LeakyReLU(0.2)(x)
    logit = layers.Dense(1, dtype="float32", name="logit")(x)  # the losses apply the sigmoid, without saturating
    return keras.Model(hr, logit, name="discriminator")


# ---- Weights ----


def load_weights(network: keras.Model, path: str | Path) -> None:
    """Load Keras weights from a file of any name.

    Raises OSError if it holds no weights, or weights that don't fit `network`, or NaN or infinity.
    """
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # Keras warns of a file that doesn't fit, before it raises
        copy = Path(folder) / "copy.weights.h5"  # Keras refuses other endings, such as "weights (1).h5"
        shutil.copyfile(path, copy)
        try:
            network.load_weights(copy)
        except Exception as error:  # Keras and h5py raise a dozen kinds on damaged files
            raise OSError(f"{path} doesn't hold weights of the {network.name}") from error
    for weight in network.get_weights():
        if not np.isfinite(weight).all():
            raise OSError(f"{path} holds weights that are not finite: the training that made it had failed")


def load_generator(path: str | Path, srresnet: str | Path | None = None, blend: float = 1.0) -> keras.Model:
    """A generator with the weights of a file; with `srresnet`, another file, a mix: `blend` 0 is all `srresnet`."""
    network = generator()
    load_weights(network, path)
    if srresnet is not None:
        weights = network.get_weights()
        load_weights(network, srresnet)
        mixed = [(1 - blend) * smooth + blend * sharp for smooth, sharp in zip(network.get_weights(), weights)]
        network.set_weights(mixed)
    return network


def fold_normalizations(network: keras.Model) -> keras.Model:
    """Make a network for upscaling alone: each normalisation becomes part of the convolution before it.

    On two cores, it upscales 1.16 times as fast in bfloat16, and as close to float32 as before.
    """

    def copy(layer):
        if isinstance(layer, layers.BatchNormalization):
            return layers.Identity(name=layer.name)
        return type(layer).from_config(layer.get_config())

    folded = keras.models.clone_model(network, clone_function=copy)
    set_folded_weights(folded, network)
    return folded


def set_folded_weights(folded: keras.Model, network: keras.Model) -> None:
    """Fold the weights of `network` into `folded`, made by `fold_normalizations` of a network of the same layers."""
    previous = None
    for layer in network.layers:
        if isinstance(layer, layers.BatchNormalization):
            gamma, beta, mean, variance = layer.get_weights()
            kernel, bias = previous.get_weights()  # of the convolution
            factor = gamma / np.sqrt(variance + layer.epsilon)
            folded.get_layer(previous.name).set_weights([kernel * factor, (bias - mean) * factor + beta])
        elif layer.weights:
            folded.get_layer(layer.name).set_weights(layer.get_weights())
        previous = layer


# ---- Upscaling in tiles ----

# How far a value reaches, in LR pixels: 4 + 32 + 1 in the trunk's convolutions, 1 + 1/2 + 1 in the tail's.
TRUNK_HALO = 4 + 2 * BLOCKS + 1
TAIL_HALO = 3
# The image is mirrored at its border, as MATLAB's imresize does. With zeros there, as inside the network, the outermost
# pixels of the result get a mesh and a darker rim, 241 on a white page.
MIRRORED = 4


def parts_and_windows(span: slice, side: int, halo: int, bounds: slice):
    """Cut a span of an image's rows or columns into equal parts of at most `side`. Yields each, and a window of it.

    A window reaches at least `halo` farther than its part, or to the bounds. All windows of a span have the same size,
    because a GPU tries out its algorithms anew for each other size.
    """
    count = math.ceil((span.stop - span.start) / side)
    step = math.ceil((span.stop - span.start) / count)
    parts = [slice(start, min(start + step, span.stop)) for start in range(span.start, span.stop, step)]
    windows = [slice(max(part.start - halo, bounds.start), min(part.stop + halo, bounds.stop)) for part in parts]
    size = max(window.stop - window.start for window in windows)
    for part, window in zip(parts, windows):
        start = min(window.start, windows[-1].stop - size)  # what the bounds cut off is added on the other side
        yield part, slice(start, start + size)


class Area(NamedTuple):
    """A rectangle of an image, in LR pixels."""

    rows: slice
    columns: slice

    def tiles(self, side: int, halo: int, bounds: "Area"):
        """Cut into tiles of at most `side`. Yields each, and a window with `halo` more pixels, inside the bounds."""
        for rows, window_rows in parts_and_windows(self.rows, side, halo, bounds.rows):
            for columns, window_columns in parts_and_windows(self.columns, side, halo, bounds.columns):
                yield Area(rows, columns), Area(window_rows, window_columns)

    def within(self, other: "Area", scale: int = 1) -> tuple[slice, slice]:
        """Where this lies in an array of the pixels of `other`, enlarged `scale` times."""
        top = other.rows.start
        left = other.columns.start
        rows = slice(scale * (self.rows.start - top), scale * (self.rows.stop - top))
        columns = slice(scale * (self.columns.start - left), scale * (self.columns.stop - left))
        return rows, columns


class Upscaler:
    """Upscales images of any size: `upscaler(lr)`.

    The trunk needs 37 pixels of context and little memory, the tail 3 and some 13 kB per pixel. So the trunk gets large
    tiles, and the tail smaller ones of its features: `tiles` has their sides, in LR pixels. The result is the same as
    without tiles. `ensemble` averages over the eight flips and rotations of the image.
    """

    IN_FLIGHT = 4  # tiles that a GPU may work on while an earlier one is copied

    def __init__(self, network: keras.Model, ensemble: bool = False, tiles: tuple[int, int] | None = None):
        if tiles is None:
            tiles = (1024, 384) if tf.config.list_physical_devices("GPU") else (768, 128)
        self.trunk_side, self.tail_side = tiles
        self.ensemble = ensemble
        self.network = fold_normalizations(network)
        features = self.network.get_layer("trunk").output
        self.run_trunk = self.make_function(self.network.input, features)
        self.run_tail = self.make_function(features, self.network.output)

    @staticmethod
    def make_function(start, end):
        part = keras.Model(start, end)

        @tf.function(input_signature=[tf.TensorSpec((None, None, start.shape[-1]), start.dtype)], autograph=False)
        def run(x):
            return part(x[None], training=False)[0]

        return run

    def load(self, network: keras.Model) -> None:
        """Use the weights that a network of the same layers has now."""
        set_folded_weights(self.network, network)

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        """`(h, w, 3)` or `(h, w, 1)`, uint8 or uint16, to `(4h, 4w, same)` of the same type. Raises MemoryError.

        An image whose channels are equal stays grey.
        """
        try:
            return self.upscale_eight_ways(lr) if self.ensemble else self.upscale(lr)
        except tf.errors.ResourceExhaustedError as error:
            raise MemoryError("out of memory: close other programs that use the device") from error

    def upscale_eight_ways(self, lr):
        height, width, channels = lr.shape
        total = np.zeros((SCALE * height, SCALE * width, channels), np.uint16 if lr.dtype == np.uint8 else np.uint32)
        for mirror in (1, -1):
            for turns in range(4):
                turned = self.upscale(np.rot90(lr[:, ::mirror], turns))
                total += np.rot90(turned, -turns)[:, ::mirror]
        return ((total + 4) // 8).astype(lr.dtype)

    def upscale(self, lr):
        height, width, channels = lr.shape
        image = Area(slice(0, height), slice(0, width))
        result = np.empty((SCALE * height, SCALE * width, channels), lr.dtype)
        in_flight = collections.deque()

        def copy_oldest():
            tile, pixels = in_flight.popleft()
            result[tile.within(image, SCALE)] = pixels  # waits for the device

        for item in self.upscaled_tiles(lr, image):
            in_flight.append(item)
            if len(in_flight) > self.IN_FLIGHT:
                copy_oldest()
        while in_flight:
            copy_oldest()
        return result

    def upscaled_tiles(self, lr, image):
        """Yields areas of the image, and their pixels upscaled, on the device."""
        maximum = np.iinfo(lr.dtype).max
        is_grey = (lr == lr[..., :1]).all()
        bounds = Area(slice(-MIRRORED, image.rows.stop + MIRRORED), slice(-MIRRORED, image.columns.stop + MIRRORED))
        lr = np.pad(lr, ((MIRRORED, MIRRORED), (MIRRORED, MIRRORED), (0, 0)), "symmetric")
        trunk_tiles = list(image.tiles(self.trunk_side, TRUNK_HALO + TAIL_HALO, bounds))
        for trunk_tile, trunk_window in tqdm(trunk_tiles, unit="tile", leave=False, delay=3, disable=None):
            x = np.float32(lr[trunk_window.within(bounds)]) * np.float32(255 / maximum)
            features = self.run_trunk(np.broadcast_to(x, (*x.shape[:2], 3)))
            for tile, window in trunk_tile.tiles(self.tail_side, TAIL_HALO, bounds):
                sr = self.run_tail(features[window.within(trunk_window)])
                sr = sr[tile.within(window, SCALE)]
                if is_grey:
                    sr = tf.reduce_mean(sr, -1, keepdims=True)
                sr = tf.round(tf.clip_by_value(sr, 0, 255) * (maximum / 255))
                yield tile, tf.cast(sr, lr.dtype)


# ---- Export ----


def export(network: keras.Model, path: Path) -> None:
    """Write the generator as LiteRT (`.tflite`), ONNX (`.onnx`, with tf2onnx), or else as a SavedModel folder.

    From `(1, height, width, 3)` float32 RGB, 0 to 255, to `(1, 4 * height, 4 * width, 3)`, clipped. Raises OSError.
    """
    suffix = path.suffix.lower()
    made = path.with_suffix(suffix)  # Keras knows only lower-case endings
    format = {".tflite": "litert", ".onnx": "onnx"}.get(suffix, "tf_saved_model")
    signature = [tf.TensorSpec((1, None, None, 3), tf.float32, name="lr")]
    network = fold_normalizations(network)
    clipped = keras.Model(network.input, keras.ops.clip(network.output, 0, 255), name=network.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converters, about themselves
        try:
            clipped.export(made, format, verbose=False, input_signature=signature)
        except tf.errors.OpError as error:  # a full disk
            raise OSError(str(error).splitlines()[0]) from error
    made.rename(path)
