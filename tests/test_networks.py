"""The networks are the paper's, and so is what our layers compute. Weights come from files."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import data
import main
import model


def count(network, kind):
    return sum(type(layer).__name__ == kind for layer in network.layers)


def disturb(network):
    """Give normalisations random weights: in a fresh generator, they switch the residual branches off."""
    rng = np.random.default_rng(0)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            gamma = rng.uniform(0.2, 0.4, 64)
            beta, mean = rng.normal(0, 0.05, (2, 64))
            variance = rng.uniform(0.5, 1.5, 64)
            layer.set_weights([gamma, beta, mean, variance])


def test_the_generator_is_that_of_figure_4():
    generator = model.generator()
    assert generator.count_params() == 1_554_883
    assert count(generator, "Conv2D") == 1 + 16 * 2 + 1 + 2
    assert count(generator, "BatchNormalization") == 16 * 2 + 1
    assert count(generator, "PReLU") == 1 + 16 + 1
    assert count(generator, "ShufflePReLUConv") == 1
    assert generator(np.zeros((2, 7, 31, 3), np.float32)).shape == (2, 28, 124, 3)


def test_the_discriminator_is_that_of_figure_4():
    discriminator = model.discriminator()
    assert discriminator.count_params() == 23_569_217
    assert count(discriminator, "LeakyReLU") == 8 + 1
    assert count(discriminator, "BatchNormalization") == 7
    assert count(discriminator, "Dense") == 2
    strides = [layer.strides[0] for layer in discriminator.layers if isinstance(layer, keras.layers.Conv2D)]
    assert strides == [1, 2] * 4
    assert discriminator(np.zeros((3, 96, 96, 3), np.float32)).shape == (3, 1)


def test_tail_is_the_papers_pixel_shuffle_prelu_and_convolution():
    rng = np.random.default_rng(0)
    tail = model.ShufflePReLUConv()
    tail.build((None, None, None, 256))
    alpha, kernel, bias = (rng.normal(0, 0.1, weight.shape) for weight in tail.weights)
    tail.set_weights([alpha, kernel, bias])
    x = rng.normal(0, 1, (2, 5, 7, 256)).astype(np.float32)
    shuffled = x.reshape(2, 5, 7, 2, 2, 64).transpose(0, 1, 3, 2, 4, 5).reshape(2, 10, 14, 64)
    conv = keras.layers.Conv2D(3, 9, padding="same")
    conv.build((None, None, None, 64))
    conv.set_weights([kernel, bias])
    expected = conv(np.where(shuffled > 0, shuffled, alpha * shuffled))
    np.testing.assert_allclose(tail(x), expected, atol=1e-4)


def test_our_batch_normalization_computes_what_kerass_does():
    x = np.random.default_rng(0).normal(1, 2, (16, 24, 24, 8)).astype(np.float32)
    ours = model.BatchNormalization()
    kerass = keras.layers.BatchNormalization()
    for training in (True, False):
        for layer in (ours, kerass):
            layer(x)  # builds it
            layer.set_weights(np.linspace(0.5, 1.5, 32).reshape(4, 8))
        np.testing.assert_allclose(ours(x, training=training), kerass(x, training=training), atol=1e-5)
        for a, b in zip(ours.get_weights(), kerass.get_weights()):
            np.testing.assert_allclose(a, b, rtol=1e-5)  # the variance of 9,216 values or of one less


def test_folded_normalizations_compute_the_same():
    network = model.generator(blocks=2)
    disturb(network)
    folded = model.fold_normalizations(network)
    assert count(folded, "BatchNormalization") == 0
    lr = np.random.default_rng(0).integers(0, 256, (1, 20, 30, 3)).astype(np.float32)
    expected = network(lr, training=False)
    assert np.abs(expected - model.generator(blocks=2)(lr)).mean() > 1  # they do something
    np.testing.assert_allclose(folded(lr), expected, atol=1e-2)  # grey levels


def test_bfloat16_is_close_and_does_not_shift_colours():
    """Training would learn to make up for a shift, and the weights be wrong in float32."""
    lr = data.read_rgb(main.WEIGHTS.parents[1] / "input.jpg")[None].astype(np.float32)
    weights = main.WEIGHTS.with_name("srresnet.weights.h5")
    exact = model.load_generator(weights)(lr)
    keras.config.set_dtype_policy("mixed_bfloat16")
    mixed = model.load_generator(weights)
    assert {weight.dtype for weight in mixed.weights} == {"float32"}
    for network in (mixed, model.fold_normalizations(mixed)):
        sr = network(lr)
        difference = sr - exact
        assert sr.dtype == tf.float32
        assert 0 < np.abs(difference).mean() < 2  # grey levels
        assert np.abs(np.mean(difference, (0, 1, 2))).max() < 0.3


@pytest.mark.parametrize("name", ["srgan.weights (1).h5", "best.h5", "weights"])
def test_weights_are_read_from_a_file_of_any_name(tmp_path, name):
    network = model.generator(blocks=1)
    disturb(network)
    network.save_weights(tmp_path / "a.weights.h5")
    (tmp_path / "a.weights.h5").rename(tmp_path / name)
    other = model.generator(blocks=1)
    model.load_weights(other, tmp_path / name)
    for a, b in zip(network.get_weights(), other.get_weights()):
        np.testing.assert_array_equal(a, b)


def test_files_without_good_weights_are_refused_by_name(tmp_path):
    network = model.generator(blocks=2)
    network.save_weights(tmp_path / "whole.weights.h5")
    whole = (tmp_path / "whole.weights.h5").read_bytes()
    for name in ("nan", "inf"):
        network.get_layer("block2_norm1").moving_variance.assign(np.full(64, float(name)))
        network.save_weights(tmp_path / f"{name}.weights.h5")
        with pytest.raises(OSError, match=f"{name}.weights.h5 holds weights that are not finite"):
            model.load_weights(network, tmp_path / f"{name}.weights.h5")

    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save_weights(tmp_path / "other.weights.h5")
    damaged = whole[:680] + bytes(255 - byte for byte in whole[680:688]) + whole[688:]
    (tmp_path / "damaged.weights.h5").write_bytes(damaged)
    (tmp_path / "text.weights.h5").write_text("no weights")
    for name in ("other", "damaged", "text"):
        with pytest.raises(OSError, match=f"{name}.weights.h5 doesn't hold weights of the generator"):
            model.load_weights(network, tmp_path / f"{name}.weights.h5")
