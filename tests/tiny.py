"""Networks of a few weights in place of the real ones, here and in processes of their own."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main

main.start_tensorflow()

import keras
import tensorflow as tf
from keras import layers

import data
import losses
import model
import train


def generator(precision="float32"):
    lr = keras.Input((None, None, 3))
    x = model.normalization(precision)(
        layers.Conv2D(48, 3, padding="same", use_bias=False)(layers.Rescaling(1 / 255)(lr))
    )
    return keras.Model(lr, layers.Rescaling(127.5, 127.5)(keras.ops.depth_to_space(x, 4)), name="generator")


def discriminator(precision="float32"):
    hr = keras.Input((96, 96, 3))
    x = model.normalization(precision)(layers.Conv2D(4, 3, 4, use_bias=False)(layers.Rescaling(1 / 255)(hr)))
    return keras.Model(hr, layers.Dense(1)(layers.Flatten()(layers.LeakyReLU(0.2)(x))), name="discriminator")


def vgg_features(layer="", weights=None, precision="float32"):
    images = keras.Input((None, None, 3))
    conv = layers.Conv2D(4, 3, kernel_initializer=keras.initializers.GlorotUniform(seed=0))
    vgg = keras.Model(images, conv(layers.Rescaling(1 / 255)(images)))
    vgg.trainable = False
    return vgg


def use(patch, folder):
    """Let the program use them, and `folder` for prepared images. `patch` is setattr, or monkeypatch's."""
    patch(model, "generator", generator)
    patch(model, "discriminator", discriminator)
    patch(losses, "vgg_features", vgg_features)
    patch(data, "FOLDER", Path(folder) / "data")


def split_cpu(devices):
    """Let the program train on as many logical devices."""
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
    names = [f"CPU:{i}" for i in range(devices)]
    train.make_strategy = lambda: tf.distribute.MirroredStrategy(names)


def run(flags, folder, output, real_networks=False, devices=1, **environment):
    """The program in a process of its own, which prints to the file `output`."""
    file = os.open(output, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    if real_networks:
        data.FOLDER = Path(folder) / "data"
    else:
        use(setattr, folder)
    if devices > 1:
        split_cpu(devices)
    sys.exit(main.main(flags))
