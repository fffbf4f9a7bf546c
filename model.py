"""The two networks of SRGAN (Ledig et al. 2017, section 2.1 and Figure 4); upscaling images of any size; export.

Images are RGB, NHWC, 0 to 255; each network rescales them internally. With Keras's policy `mixed_bfloat16`, the layers
of the generator that touch the image stay float32: bfloat16's 8 significant bits would shift colours by a grey level.
"""

import itertools
import warnings
from functools import partial
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from tqdm import tqdm

SCALE = 4
BLOCKS = 16  # the generator's residual blocks
# How far a value reaches, in LR pixels: 4 + 32 + 1 in the trunk's convolutions, 1 + 1/2 + 1 in the tail's.
TRUNK_HALO, TAIL_HALO = 4 + 2 * BLOCKS + 1, 3


class BatchNormalization(layers.BatchNormalization):
    """Keras's, with TensorFlow's fused kernel in training: one pass over the features instead of a dozen."""

    def call(self, x, training=False):
        if not training or self.synchronized:  # there is no fused kernel over several devices
            return super().call(x, training=training)
        y, mean, variance = tf.compat.v1.nn.fused_batch_norm(x, self.gamma, self.beta, epsilon=self.epsilon)
        self.moving_mean.assign(self.moving_mean * self.momentum + mean * (1 - self.momentum))
        self.moving_variance.assign(self.moving_variance * self.momentum + variance * (1 - self.momentum))
        return y


def normalization(**kwargs):
    several = tf.distribute.get_strategy().num_replicas_in_sync > 1  # then the statistics are those of the whole batch
    return BatchNormalization(momentum=0.99, epsilon=1e-5, synchronized=several, **kwargs)


class ShufflePReLUConv(layers.Layer):
    """The last pixel shuffle, PReLU and 9x9 convolution of Figure 4: `(batch, h, w, 256)` to `(batch, 2h, 2w, 3)`.

    The same result, computed faster. A convolution from 64 channels to 3 uses 3 of a processor's 8 or 16 SIMD lanes.
    Before the pixel shuffle, it becomes a 5x5 convolution from 256 channels to 12: the 9x9 kernel is padded to 10x10 in
    four ways, one for each pixel of a 2x2 block, and split into 5x5 taps of 2x2 values.
    """

    def build(self, shape):
        self.alpha = self.add_weight(name="alpha", shape=(64,), initializer=keras.initializers.Constant(0.25))
        self.kernel = self.add_weight(name="kernel", shape=(9, 9, 64, 3))
        self.bias = self.add_weight(name="bias", shape=(3,), initializer="zeros")

    def call(self, x):
        x = tf.where(x > 0, x, tf.tile(self.alpha, [4]) * x)
        ways = [[[i, 1 - i], [j, 1 - j], [0, 0], [0, 0]] for i in (0, 1) for j in (0, 1)]
        kernel = tf.concat([tf.pad(self.kernel, way) for way in ways], axis=3)  # (10, 10, 64, 12)
        kernel = tf.reshape(kernel, (5, 2, 5, 2, 64, 12))  # tap, its 2x2 block; in, 2x2 block and out
        kernel = tf.reshape(tf.transpose(kernel, (0, 2, 1, 3, 4, 5)), (5, 5, 256, 12))
        return tf.nn.depth_to_space(tf.nn.conv2d(x, kernel, 1, "SAME") + tf.tile(self.bias, [4]), 2)


def generator() -> keras.Model:
    """SRResNet: 16 residual blocks at LR resolution, then two pixel shuffles (Figure 4, top).

    `(batch, height, width, 3)` in, `(batch, 4 * height, 4 * width, 3)` out, float32, of any size. Values may leave 0 to
    255 a little: clip when the image is made. A fresh one upscales like an interpolation (`start_as_interpolation`).
    """
    conv = partial(layers.Conv2D, padding="same")
    prelu = partial(layers.PReLU, shared_axes=[1, 2], alpha_initializer=keras.initializers.Constant(0.25))
    lr = keras.Input((None, None, 3), name="lr")
    x = layers.Rescaling(1 / 255, dtype="float32", name="unit")(lr)  # [0, 1]
    x = skip = prelu(name="head_prelu")(conv(64, 9, dtype="float32", name="head_conv")(x))
    for i in range(1, BLOCKS + 1):
        y = conv(64, 3, name=f"block{i}_conv1")(x)
        y = prelu(name=f"block{i}_prelu")(normalization(name=f"block{i}_norm1")(y))
        y = conv(64, 3, name=f"block{i}_conv2")(y)
        y = normalization(gamma_initializer="zeros", name=f"block{i}_norm2")(y)
        x = layers.Add(name=f"block{i}")([x, y])
    x = normalization(gamma_initializer="zeros", name="trunk_norm")(conv(64, 3, name="trunk_conv")(x))
    x = layers.Add(name="trunk")([skip, x])  # (batch, h, w, 64)
    x = keras.ops.depth_to_space(conv(256, 3, name="up1_conv")(x), 2)  # (batch, 2h, 2w, 64)
    x = prelu(name="up1_prelu")(x)
    x = ShufflePReLUConv(name="tail", dtype="float32")(conv(256, 3, name="up2_conv")(x))  # (batch, 4h, 4w, 3), [-1, 1]
    sr = layers.Rescaling(127.5, 127.5, dtype="float32", name="sr")(x)
    model = keras.Model(lr, sr, name="generator")
    start_as_interpolation(model)
    return model


def start_as_interpolation(model: keras.Model) -> None:
    """Let channels 0 to 2 carry the image from end to end: training starts at bicubic's PSNR, not 20 dB below it."""
    # The residual branches end in a gamma of 0. The up-convolutions get the taps of a quadratic interpolation at -1/4
    # and, mirrored, +1/4 of a pixel, one phase for each output of the pixel shuffle.
    rgb, taps = np.arange(3), np.array([0.15625, 0.9375, -0.09375])
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
    x = layers.LeakyReLU(0.2)(layers.Dense(1024, name="dense1")(layers.Flatten()(x)))  # from 6 * 6 * 512
    logit = layers.Dense(1, dtype="float32", name="logit")(x)  # the losses apply the sigmoid, without saturating
    return keras.Model(hr, logit, name="discriminator")


def load_weights(network: keras.Model, path: str | Path) -> None:
    """Load a `.weights.h5` file. Raises OSError if it isn't one, doesn't fit `network`, or holds NaN or infinity."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns of a file that doesn't fit, before it raises
            network.load_weights(path)
    except Exception as error:  # Keras and h5py raise a dozen kinds on damaged files
        raise OSError(f"{path} doesn't hold weights of the {network.name}") from error
    if not all(np.isfinite(weight).all() for weight in network.get_weights()):
        raise OSError(f"{path} holds weights that are not finite: the training that made it had failed")


def load_generator(path: Path, blend: float | None = None) -> keras.Model:
    """A generator with weights from a file; with `blend`, between SRResNet's, beside it (0), and these (1)."""
    network = generator()
    load_weights(network, path)
    if blend is not None:
        weights, srresnet = network.get_weights(), path.with_name("srresnet.weights.h5")
        if srresnet.samefile(path):
            raise OSError(f"--blend mixes {srresnet} with SRGAN's weights: give those as --weights")
        load_weights(network, srresnet)
        network.set_weights([(1 - blend) * a + blend * b for a, b in zip(network.get_weights(), weights)])
    return network


def tiled(function, image, scale: int, tile: int, halo: int) -> np.ndarray:
    """Enlarge `(h, w, channels)` by `function` in tiles with `halo` more pixels around: exact if it sees no farther."""
    height, width, result = *image.shape[:2], None
    for top in range(0, height, tile):
        rows, lefts = image[max(top - halo, 0) : top + tile + halo], range(0, width, tile)
        # A GPU gets all the work of a row before the first result is waited for.
        parts = [function(rows[:, max(left - halo, 0) : left + tile + halo]) for left in lefts]
        for left, part in zip(lefts, parts):
            part = np.asarray(part[scale * min(top, halo) :, scale * min(left, halo) :][: scale * tile, : scale * tile])
            result = np.empty((scale * height, scale * width, part.shape[-1]), part.dtype) if result is None else result
            result[scale * top : scale * (top + tile), scale * left : scale * (left + tile)] = part
    return result


def make_upscaler(network: keras.Model, ensemble: bool = False, tiles: tuple[int, int] | None = None):
    """Make `upscale(lr)`: `(h, w, 3)` or `(h, w, 1)`, uint8 or uint16, to `(4h, 4w, same)` of the same type, in tiles.

    The trunk needs 37 pixels of context and little memory, the tail 3 and some 13 kB per pixel. So the trunk gets large
    tiles, and the tail smaller ones of its features: `tiles` has their sides, in LR pixels. An image whose channels are
    equal stays grey. `ensemble` averages over the eight flips and rotations of each tile. Raises MemoryError.
    """
    trunk_tile, tail_tile = tiles or ((1024, 384) if tf.config.list_physical_devices("GPU") else (768, 128))

    def compiled(start, end):
        part, spec = keras.Model(start, end), tf.TensorSpec((None, None, start.shape[-1]), start.dtype)
        return tf.function(lambda x: part(x[None], training=False)[0], input_signature=[spec], autograph=False)

    trunk = network.get_layer("trunk").output
    run_trunk, run_tail = compiled(network.input, trunk), compiled(trunk, network.output)

    def upscale(lr):
        grey, maximum = bool((lr == lr[..., :1]).all()), np.iinfo(lr.dtype).max

        def run(x, finish):
            return tiled(lambda features: finish(run_tail(features)), run_trunk(x), SCALE, tail_tile, TAIL_HALO)

        def to_pixels(sr):  # on the device, from which a fourth of the bytes then return
            sr = tf.reduce_mean(sr, -1, keepdims=True) if grey else sr
            return tf.cast(tf.round(tf.clip_by_value(sr, 0, 255) * (maximum / 255)), lr.dtype)

        def run_tile(x):
            x = np.broadcast_to(np.float32(x) * np.float32(255 / maximum), (*x.shape[:2], 3))
            sr = 0 if ensemble else run(x, to_pixels)
            for mirror, turns in itertools.product((1, -1), range(4)) if ensemble else ():
                turned = run(np.rot90(x[:, ::mirror], turns), lambda sr: sr)
                sr = sr + np.rot90(turned, -turns)[:, ::mirror]
            bar.update()
            return to_pixels(sr / 8) if ensemble else sr

        count = int(np.prod(np.ceil(np.divide(lr.shape[:2], trunk_tile))))
        try:
            with tqdm(total=count, unit="tile", leave=False, delay=3, disable=None) as bar:
                sr = tiled(run_tile, lr, SCALE, trunk_tile, TRUNK_HALO + TAIL_HALO)
        except tf.errors.ResourceExhaustedError as error:
            raise MemoryError("out of memory: close other programs that use the device") from error
        return sr if sr.shape[-1] == lr.shape[-1] else sr.repeat(3, axis=-1)

    return upscale


def export(network: keras.Model, path: Path) -> None:
    """Write the generator as LiteRT (`.tflite`), ONNX (`.onnx`, with tf2onnx), or else as a SavedModel folder.

    From `(1, height, width, 3)` float32 RGB, 0 to 255, to `(1, 4 * height, 4 * width, 3)`, clipped. Raises OSError.
    """
    form = {".tflite": "litert", ".onnx": "onnx"}.get(path.suffix, "tf_saved_model")
    signature = [tf.TensorSpec((1, None, None, 3), tf.float32, name="lr")]
    clipped = keras.Model(network.input, keras.ops.clip(network.output, 0, 255), name=network.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converters, about themselves
        try:
            clipped.export(path, form, verbose=False, input_signature=signature)
        except tf.errors.OpError as error:  # a full disk
            raise OSError(str(error).splitlines()[0]) from error
