"""Networks of a few weights in place of the real ones, here and in processes of their own."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main

main.start_tensorflow()  # before anything computes, as the program does

import keras
import tensorflow as tf
from keras import layers

import losses
import model
import train


def generator():
    lr = keras.Input((None, None, 3), name="lr")
    conv = layers.Conv2D(48, 3, padding="same", name="conv")
    x = model.normalization(name="trunk")(conv(layers.Rescaling(1 / 255, name="unit")(lr)))
    x = keras.ops.depth_to_space(x, 4)
    sr = layers.Rescaling(127.5, 127.5, dtype="float32", name="sr")(x)
    return keras.Model(lr, sr, name="generator")


def discriminator():
    hr = keras.Input((96, 96, 3))
    x = layers.Conv2D(4, 3, 4, use_bias=False)(layers.Rescaling(1 / 255)(hr))
    x = layers.LeakyReLU(0.2)(model.normalization()(x))
    logit = layers.Dense(1, dtype="float32")(layers.Flatten()(x))
    return keras.Model(hr, logit, name="discriminator")


def vgg_features(layer="", weights=None):
    images = keras.Input((None, None, 3))
    conv = layers.Conv2D(4, 3, kernel_initializer=keras.initializers.GlorotUniform(seed=0), trainable=False)
    features = conv(layers.Rescaling(1 / 255)(images))
    return keras.Model(images, layers.Rescaling(1, dtype="float32")(features))


def use(patch):
    """Let the program use them. `patch` is setattr, or monkeypatch's."""
    patch(model, "generator", generator)
    patch(model, "discriminator", discriminator)
    patch(losses, "vgg_features", vgg_features)


def run(argv, output, real_networks=False, devices=1, **environment):
    """The program in a process of its own, which prints to the file `output`."""
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.update(environment)
    if not real_networks:
        use(setattr)
    if devices > 1:  # as many logical devices
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
        train.make_strategy = lambda: tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(devices)])
    sys.exit(main.main(argv))
