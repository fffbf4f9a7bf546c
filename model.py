"""The two networks of SRGAN (Ledig et al. 2017, section 2.1 and Figure 4), and running the generator over any picture.

Pictures are RGB, NHWC, 0 to 255 on both sides of a network; each rescales inside itself.
"""

import warnings
from functools import partial

import keras
import numpy as np
from keras import layers

SCALE = 4


def _policy(precision):
    """Mixed precision keeps the weights in float32 and computes in bfloat16."""
    return "mixed_bfloat16" if precision == "bfloat16" else "float32"


def _normalization(policy, **kwargs):
    return layers.BatchNormalization(momentum=0.99, epsilon=1e-5, dtype=policy, **kwargs)


def generator(precision="float32"):
    """SRResNet: 16 residual blocks at LR resolution, then two pixel shuffles (Figure 4, top).

    Fully convolutional: `(batch, height, width, 3)` in, `(batch, 4 * height, 4 * width, 3)` out, float32. The last
    layer is linear, so values may leave 0 to 255 a little: clip when the picture is made. A fresh generator upscales
    like an interpolation (see `_start_as_interpolation`).
    """
    policy = _policy(precision)
    conv = partial(layers.Conv2D, padding="same", kernel_initializer="he_normal", dtype=policy)
    prelu = partial(layers.PReLU, shared_axes=[1, 2], alpha_initializer=keras.initializers.Constant(0.25), dtype=policy)
    norm = partial(_normalization, policy)

    lr = keras.Input((None, None, 3), name="lr")
    x = layers.Rescaling(1 / 255, dtype=policy)(lr)  # [0, 1]
    x = skip = prelu(name="head_prelu")(conv(64, 9, name="head_conv")(x))
    for i in range(1, 17):
        y = conv(64, 3, name=f"block{i}_conv1")(x)
        y = prelu(name=f"block{i}_prelu")(norm(name=f"block{i}_norm1")(y))
        y = conv(64, 3, name=f"block{i}_conv2")(y)
        y = norm(gamma_initializer="zeros", name=f"block{i}_norm2")(y)
        x = layers.Add(dtype=policy, name=f"block{i}")([x, y])
    x = norm(gamma_initializer="zeros", name="trunk_norm")(conv(64, 3, name="trunk_conv")(x))
    x = layers.Add(dtype=policy, name="trunk")([skip, x])  # (batch, h, w, 64)
    for i in (1, 2):
        x = conv(256, 3, name=f"up{i}_conv")(x)
        x = keras.ops.depth_to_space(x, 2)  # (batch, 2h, 2w, 64), then (batch, 4h, 4w, 64)
        x = prelu(name=f"up{i}_prelu")(x)
    x = conv(3, 9, name="tail_conv", dtype="float32")(x)  # [-1, 1]
    sr = layers.Rescaling(127.5, 127.5, dtype="float32", name="sr")(x)

    model = keras.Model(lr, sr, name="generator")
    _start_as_interpolation(model)
    return model


def _start_as_interpolation(model):
    """Let channels 0 to 2 carry the picture from end to end, and everything else start silent.

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

    def tail(kernel, bias):
        kernel[:] = 0
        kernel[4, 4, rgb, rgb] = 2  # [0, 1] to [-1, 1]
        bias[:] = -1

    def linear(alpha):
        alpha[..., rgb] = 1

    edit("head_conv", head)
    edit("tail_conv", tail)
    for name in ("up1_conv", "up2_conv"):
        edit(name, up)
    for name in ("head_prelu", "up1_prelu", "up2_prelu"):
        edit(name, linear)


def discriminator(precision="float32"):
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
            x = _normalization(policy, name=f"norm{i}")(x)
        x = layers.LeakyReLU(0.2, dtype=policy)(x)
    x = layers.Flatten(dtype=policy)(x)  # (batch, 6 * 6 * 512)
    x = layers.LeakyReLU(0.2, dtype=policy)(layers.Dense(1024, dtype=policy, name="dense1")(x))
    logit = layers.Dense(1, dtype="float32", name="logit")(x)
    return keras.Model(hr, logit, name="discriminator")


def load_weights(network, path):
    """Load a `.weights.h5` file. Raises ValueError if it is none, or doesn't fit `network`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Keras says of a file that doesn't fit, before it raises
            network.load_weights(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} doesn't hold weights of the {network.name}") from error
