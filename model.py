"""The two networks of SRGAN (Ledig et al. 2017, section 2.1 and Figure 4); upscaling images of any size; export.

Images are RGB, NHWC, 0 to 255; each network rescales them internally.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras import layers

SCALE = 4
BLOCKS = 16  # the generator's residual blocks


def _policy(precision):
    """Mixed precision keeps the weights in float32 and computes in bfloat16."""
    return "mixed_bfloat16" if precision == "bfloat16" else "float32"


class BatchNormalization(layers.BatchNormalization):
    """Keras's, with TensorFlow's fused kernels in training: one pass over the features instead of a dozen."""

    def call(self, x, training=False):
        if not training or self.synchronized:  # there is no fused kernel over several devices
            return super().call(x, training=training)
        y, mean, variance = tf.compat.v1.nn.fused_batch_norm(x, self.gamma, self.beta, epsilon=self.epsilon)
        for moving, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + value * (1 - self.momentum))
        return y


def normalization(policy: str, **kwargs) -> BatchNormalization:
    several = tf.distribute.get_strategy().num_replicas_in_sync > 1  # then the statistics are those of the whole batch
    return BatchNormalization(momentum=0.99, epsilon=1e-5, synchronized=several, dtype=policy, **kwargs)


def _prelu(x, alpha):
    return tf.where(x > 0, x, alpha * x)


class PReLU(layers.PReLU):
    """Keras's, in one pass less over the features."""

    def call(self, x):
        return _prelu(x, tf.cast(self.alpha, x.dtype))


class ShufflePReLUConv(layers.Layer):
    """The last pixel shuffle, PReLU and 9x9 convolution of Figure 4: `(batch, h, w, 256)` to `(batch, 2h, 2w, 3)`.

    The same result, computed faster. A convolution from 64 channels to 3 uses 3 of a processor's 8 or 16 SIMD lanes.
    Before the pixel shuffle, it becomes a 5x5 convolution from 256 channels to 12: the 9x9 kernel is padded to 10x10 in
    four ways, one for each pixel of a 2x2 block, and split into 5x5 taps of 2x2 values. A training step takes 16 % less
    time than in the paper's order.
    """

    def build(self, shape):
        self.alpha = self.add_weight(name="alpha", shape=(64,), initializer=keras.initializers.Constant(0.25))
        self.kernel = self.add_weight(name="kernel", shape=(9, 9, 64, 3))
        self.bias = self.add_weight(name="bias", shape=(3,), initializer="zeros")

    def call(self, x):
        x = _prelu(x, tf.tile(self.alpha, [4]))
        # Rows, then columns: padded in four ways at once, the kernel's gradient would be a sum of four, whose order
        # depends on timing (see train.compiled).
        kernel = tf.stack([tf.pad(self.kernel, [[i, 1 - i], [0, 0], [0, 0], [0, 0]]) for i in (0, 1)], axis=3)
        kernel = tf.stack([tf.pad(kernel, [[0, 0], [j, 1 - j], [0, 0], [0, 0], [0, 0]]) for j in (0, 1)], axis=4)
        kernel = tf.reshape(kernel, (5, 2, 5, 2, 64, 12))  # tap, its 2x2 block; in, 2x2 block and out
        kernel = tf.reshape(tf.transpose(kernel, (0, 2, 1, 3, 4, 5)), (5, 5, 256, 12))
        return tf.nn.depth_to_space(tf.nn.conv2d(x, kernel, 1, "SAME") + tf.tile(self.bias, [4]), 2)


def generator(precision: str = "float32") -> keras.Model:
    """SRResNet: 16 residual blocks at LR resolution, then two pixel shuffles (Figure 4, top).

    Fully convolutional: `(batch, height, width, 3)` in, `(batch, 4 * height, 4 * width, 3)` out, float32. The last
    layer is linear, so values may leave 0 to 255 a little: clip when the image is made. A fresh generator upscales
    like an interpolation (see `_start_as_interpolation`).

    The first and last layers are computed in float32 at any `precision`. In bfloat16, with its 8 significant bits, the
    first would shift colours by up to a grey level; training would compensate for that, and its weights would then be
    as far off in float32.
    """
    policy = _policy(precision)
    conv = partial(layers.Conv2D, padding="same", dtype=policy)
    prelu = partial(PReLU, shared_axes=[1, 2], alpha_initializer=keras.initializers.Constant(0.25), dtype=policy)
    norm = partial(normalization, policy)

    lr = keras.Input((None, None, 3), name="lr")
    x = layers.Rescaling(1 / 255, dtype="float32", name="unit")(lr)  # [0, 1]
    skip = prelu(name="head_prelu")(conv(64, 9, dtype="float32", name="head_conv")(x))
    x = keras.ops.copy(skip)  # so that no gradient is a sum over three uses (see train.compiled)
    for i in range(1, BLOCKS + 1):
        y = conv(64, 3, name=f"block{i}_conv1")(x)
        y = prelu(name=f"block{i}_prelu")(norm(name=f"block{i}_norm1")(y))
        y = conv(64, 3, name=f"block{i}_conv2")(y)
        y = norm(gamma_initializer="zeros", name=f"block{i}_norm2")(y)
        x = layers.Add(dtype=policy, name=f"block{i}")([x, y])
    x = norm(gamma_initializer="zeros", name="trunk_norm")(conv(64, 3, name="trunk_conv")(x))
    x = layers.Add(dtype=policy, name="trunk")([skip, x])  # (batch, h, w, 64)
    x = keras.ops.depth_to_space(conv(256, 3, name="up1_conv")(x), 2)  # (batch, 2h, 2w, 64)
    x = prelu(name="up1_prelu")(x)
    x = ShufflePReLUConv(name="tail", dtype="float32")(conv(256, 3, name="up2_conv")(x))  # (batch, 4h, 4w, 3), [-1, 1]
    sr = layers.Rescaling(127.5, 127.5, dtype="float32", name="sr")(x)

    model = keras.Model(lr, sr, name="generator")
    _start_as_interpolation(model)
    return model


def _start_as_interpolation(model):
    """Let channels 0 to 2 carry the image from end to end, and everything else start silent.

    The residual branches end in a normalisation with gamma 0, so the trunk begins as the identity; the two
    up-convolutions hold the taps of a quadratic interpolation at -1/4 and +1/4 of a pixel, one phase for each output
    of the pixel shuffle. Training then starts at bicubic's PSNR and not 20 dB below it.
    """
    rgb = np.arange(3)

    def edit(name, change):
        layer = model.get_layer(name)
        weights = layer.get_weights()
        change(*weights)
        layer.set_weights(weights)

    def head(kernel, bias):
        kernel[..., rgb] = 0
        kernel[4, 4, rgb, rgb] = 1

    def up(kernel, bias):
        before = np.array([0.15625, 0.9375, -0.09375])  # the value 1/4 pixel before the centre tap
        taps = before, before[::-1]
        for row in (0, 1):
            for column in (0, 1):
                phase = (2 * row + column) * 64 + rgb  # the channels that depth_to_space puts there
                kernel[..., phase] = 0
                kernel[:, :, rgb, phase] = np.outer(taps[row], taps[column])[..., None]

    def tail(alpha, kernel, bias):
        alpha[rgb] = 1
        kernel[:] = 0
        kernel[4, 4, rgb, rgb] = 2  # [0, 1] to [-1, 1]
        bias[:] = -1

    def linear(alpha):
        alpha[..., rgb] = 1

    edit("head_conv", head)
    edit("tail", tail)
    for name in ("up1_conv", "up2_conv"):
        edit(name, up)
    for name in ("head_prelu", "up1_prelu"):
        edit(name, linear)


def discriminator(precision: str = "float32") -> keras.Model:
    """The discriminator for 96x96 patches (Figure 4, bottom): `(batch, 96, 96, 3)` in, `(batch, 1)` logits out.

    A logit and not a sigmoid: the same loss, computed without saturating.
    """
    policy = _policy(precision)
    hr = keras.Input((96, 96, 3), name="hr")
    x = layers.Rescaling(1 / 127.5, -1, dtype=policy)(hr)  # [-1, 1]
    for i, (filters, stride) in enumerate(
        [(64, 1), (64, 2), (128, 1), (128, 2), (256, 1), (256, 2), (512, 1), (512, 2)], start=1
    ):
        x = layers.Conv2D(filters, 3, stride, padding="same", dtype=policy, name=f"conv{i}")(x)
        if i > 1:
            x = normalization(policy, name=f"norm{i}")(x)
        x = layers.LeakyReLU(0.2, dtype=policy)(x)
    x = layers.Flatten(dtype=policy)(x)  # (batch, 6 * 6 * 512)
    x = layers.LeakyReLU(0.2, dtype=policy)(layers.Dense(1024, dtype=policy, name="dense1")(x))
    logit = layers.Dense(1, dtype="float32", name="logit")(x)
    return keras.Model(hr, logit, name="discriminator")


def measure_statistics(network, batches):
    """Set the statistics of the normalisation layers to their means over `batches`, a list of inputs."""
    normalizations = [layer for layer in network.layers if isinstance(layer, layers.BatchNormalization)]
    for i, batch in enumerate(batches):
        for layer in normalizations:
            layer.momentum = i / (i + 1)  # the mean of all batches so far
        network(batch, training=True)


# ------------------------------------------------------------------------------------------------- weights from files


def load_weights(network: keras.Model, path: str | Path) -> None:
    """Load a `.weights.h5` file. Raises ValueError if it isn't one, doesn't fit `network`, or holds NaN or infinity."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns of a file that doesn't fit, before it raises
            network.load_weights(path)
    except Exception as error:  # Keras and h5py raise a dozen kinds on damaged files
        raise ValueError(f"{path} doesn't hold weights of the {network.name}") from error
    if not all(np.isfinite(weight).all() for weight in network.get_weights()):
        raise ValueError(f"{path} holds weights that are not finite: the training that made it had failed")


def load_generator(paths: list[Path], blend: float | None = None, precision: str = "float32") -> keras.Model:
    """A generator with the weights of one file or, with `blend`, of two. Raises ValueError like `load_weights`."""
    network = generator(precision)
    if blend is None:
        load_weights(network, *paths)
    else:
        load_blend(network, *paths, blend)
    return network


def load_blend(network: keras.Model, srresnet: str | Path, srgan: str | Path, amount: float) -> None:
    """Load weights between those of two files: with `amount` 0 SRResNet's, with 1 SRGAN's. Raises ValueError."""
    load_weights(network, srresnet)
    start = network.get_weights()
    load_weights(network, srgan)
    network.set_weights([(1 - amount) * a + amount * b for a, b in zip(start, network.get_weights())])


# ----------------------------------------------------------------------------- the generator on an image of any size

# How far a value reaches, in LR pixels: 4 + 32 + 1 in the trunk's convolutions, 1 + 1/2 + 1 in the tail's (and 3 in
# `LocalLimits`).
TRUNK_HALO, TAIL_HALO = 4 + 2 * BLOCKS + 1, 3


def cover(length: int, tile: int, halo: int) -> list[tuple[int, int, int, int]]:
    """Cover an axis by tiles that overlap by twice `halo`: a list of `(start, size, low, high)`, with `size` <= `tile`.

    A tile spans `start` to `start + size`, of which `low` to `high` is used. The network's zero padding spoils `halo`
    pixels at a tile's edges: they are left out, except at the image's own edges, where the padding belongs. All tiles
    have the same size, as small as their number allows: the last ones move inward rather than stick out.
    """
    if length <= tile:
        return [(0, length, 0, length)]
    count = -(-(length - 2 * halo) // (tile - 2 * halo))  # the two outer sides need no halo
    stride = -(-(length - 2 * halo) // count)
    size = stride + 2 * halo
    starts = [min(i * stride, length - size) for i in range(count)]
    lows = [0] + [start + halo for start in starts[1:]]
    return [(start, size, low, high) for start, low, high in zip(starts, lows, lows[1:] + [length])]


def grid(height: int, width: int, tile: int, halo: int) -> Iterator[tuple[tuple, tuple]]:
    """`cover` in both directions: pairs of slices, the tile to read and the part of it to keep, in the image."""
    for top, rows, y0, y1 in cover(height, tile, halo):
        for left, columns, x0, x1 in cover(width, tile, halo):
            yield np.s_[top : top + rows, left : left + columns], np.s_[y0:y1, x0:x1]


def relative(inner, outer):
    """The slices `inner` in the coordinates of the part that `outer` cuts out."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(inner, outer))


def times(factor, slices):
    return tuple(slice(factor * s.start, factor * s.stop) for s in slices)


def area(slices):
    return (slices[0].stop - slices[0].start) * (slices[1].stop - slices[1].start)


class LocalLimits(layers.Layer):
    """Keeps SR, `(batch, 4h, 4w, 3)`, close to LR nearby, where the network leaves specks, rims and colour noise.

    A channel may leave the range of the 5x5 LR pixels around by half of that range and 2 grey levels. Saturation, the
    difference between the largest and the smallest channel, may reach 1.5 times the largest one of the 3x3 LR pixels
    around, so grey areas stay grey. In photographs, 1 % of the HR values and 0.2 % of the HR pixels go further.
    """

    def call(self, sr, lr):
        low, high = -tf.nn.max_pool2d(-lr, 5, 1, "SAME"), tf.nn.max_pool2d(lr, 5, 1, "SAME")
        margin = (high - low) / 2 + 2
        saturation = 1.5 * tf.nn.max_pool2d(_saturation(lr), 3, 1, "SAME")
        low, high, saturation = (
            tf.image.resize(limit, tf.shape(sr)[1:3]) for limit in (low - margin, high + margin, saturation)
        )
        sr = tf.clip_by_value(sr, low, high)
        grey = tf.reduce_mean(sr, -1, keepdims=True)
        return grey + (sr - grey) * tf.minimum(saturation / tf.maximum(_saturation(sr), 1e-6), 1)


def _saturation(image):
    red, green, blue = tf.split(image, 3, axis=-1)  # twice as fast as reductions over the axis
    return tf.maximum(tf.maximum(red, green), blue) - tf.minimum(tf.minimum(red, green), blue)


def make_upscaler(
    model: keras.Model, ensemble: bool = False, trunk_tile: int = 768, tail_tile: int = 128
) -> Callable[..., np.ndarray]:
    """Make a function that runs the generator and `LocalLimits` on an image in tiles, exactly as if in one piece.

    The trunk needs 37 pixels of context and little memory, the tail 3 pixels and much: so the image goes through the
    trunk in large tiles, and each of those through the tail in small ones. That bounds the network's memory. The image
    and the result are held whole: 3.2 MB per megapixel of an 8-bit RGB result, and 8 MB while Pillow writes it.

    Args:
        model: the generator, of any precision.
        ensemble: average over the eight flips and rotations of each tile.
        trunk_tile: the largest side of a tile for the trunk, in LR pixels; above 80. Takes about 2 kB per pixel.
        tail_tile: the same for the tail; above 6. Takes about 13 kB per pixel.

    Returns:
        `upscale(lr, progress)`: from `(h, w, 3)` or `(h, w, 1)`, uint8 or uint16, to `(4h, 4w, same)` of the same
        type. `progress(n)` is called when `n` more LR pixels are done, a float.
    """
    trunk = keras.Model(model.input, model.get_layer("trunk").output)
    tail = keras.Model(trunk.output, model.output)
    limits = LocalLimits()
    specs = [tf.TensorSpec((1, *part.input.shape[1:]), part.input.dtype) for part in (trunk, tail)]
    function = partial(tf.function, autograph=False)  # there is nothing to convert, and tracing takes a third less time
    run_trunk = function(partial(trunk, training=False), input_signature=specs[:1])  # traced once for all sizes
    run_tail = function(lambda x, lr: limits(tail(x, training=False), lr), input_signature=specs[::-1])

    def run(lr, keep, done):
        """The part `keep` of the tile `lr`, `(h, w, 3)` float32, four times larger; the rest of it is context."""
        features = run_trunk(lr[None])[0]
        done(0.5)
        crop = tuple(slice(max(s.start - TAIL_HALO, 0), min(s.stop + TAIL_HALO, n)) for s, n in zip(keep, lr.shape))
        features, lr = features[crop], lr[crop]
        height, width = lr.shape[:2]
        sr = np.empty((SCALE * height, SCALE * width, 3), np.float32)
        for tile, part in grid(height, width, tail_tile, TAIL_HALO):
            y = run_tail(features[tile][None], lr[tile][None])[0].numpy()
            sr[times(SCALE, part)] = y[times(SCALE, relative(part, tile))]
            done(0.5 * area(part) / (height * width))
        return sr[times(SCALE, relative(keep, crop))]

    compute = partial(_mean_of_turns, run) if ensemble else run

    def upscale(lr, progress=lambda n: None):
        height, width, channels = lr.shape
        unit = np.float32(np.iinfo(lr.dtype).max / 255)
        sr = np.empty((SCALE * height, SCALE * width, channels), lr.dtype)
        for tile, part in grid(height, width, trunk_tile, TRUNK_HALO + TAIL_HALO):
            x = lr[tile] / unit
            x = np.broadcast_to(x, (*x.shape[:2], 3))
            keep = relative(part, tile)
            try:
                y = compute(x, keep, lambda share: progress(share * area(part)))
            except tf.errors.ResourceExhaustedError as error:
                raise MemoryError("out of memory: close other programs that use the device") from error
            sr[times(SCALE, part)] = np.rint(np.clip(y[..., :channels], 0, 255) * unit)
        return sr

    return upscale


def _mean_of_turns(run, lr, keep, done):
    """The mean over the eight flips and turns of the tile, each turned back."""
    total = 0
    for step in (1, -1):  # as it is, mirrored
        x, (rows, columns) = lr[:, ::step], keep
        if step == -1:
            columns = slice(lr.shape[1] - columns.stop, lr.shape[1] - columns.start)
        for turn in range(4):
            total = total + np.rot90(run(x, (rows, columns), lambda share: done(share / 8)), -turn)[:, ::step]
            rows, columns = slice(x.shape[1] - columns.stop, x.shape[1] - columns.start), rows
            x = np.rot90(x)  # the right column becomes the top row
    return total / 8


# ----------------------------------------------------------------------------------------- weights for other programs


def export(network: keras.Model, path: str | Path) -> None:
    """Write the generator as LiteRT (`.tflite`), ONNX (`.onnx`, with tf2onnx), or else as a SavedModel folder.

    It takes `(1, height, width, 3)` float32 RGB, 0 to 255, of any size, and returns `(1, 4 * height, 4 * width, 3)`,
    after `LocalLimits` and clipped to 0 to 255. Written to a temporary name, then renamed; an existing file or
    folder is replaced. Raises OSError if it can't be written.
    """
    path = Path(path).absolute()  # the current folder may be replaced, too
    formats = {".tflite": "litert", ".onnx": "onnx"}
    sr = keras.ops.clip(LocalLimits()(network.output, network.input), 0, 255)
    signature = [tf.TensorSpec((1, None, None, 3), tf.float32, name="lr")]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".tmp", ".srgan-", path.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converters, about themselves
        new = Path(folder) / f"new{path.suffix.lower()}"
        try:
            keras.Model(network.input, sr, name=network.name).export(
                new, formats.get(new.suffix, "tf_saved_model"), verbose=False, input_signature=signature
            )
        except (tf.errors.OpError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise OSError(f"can't write {path}: {reason}") from error
        if path.is_dir():
            path.replace(Path(folder) / "old")
        new.replace(path)
