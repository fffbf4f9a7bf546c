"""The networks are the paper's, and so is what our layers compute."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import data
import main
import model


def test_parameters_and_layers_of_figure_4():
    generator, discriminator = model.generator(), model.discriminator()
    assert (generator.count_params(), discriminator.count_params()) == (1_554_883, 23_569_217)
    kinds = [type(layer).__name__ for layer in generator.layers]
    assert kinds.count("Conv2D") == 1 + 16 * 2 + 1 + 2 and kinds.count("BatchNormalization") == 16 * 2 + 1
    assert kinds.count("PReLU") == 1 + 16 + 1 and kinds.count("ShufflePReLUConv") == 1
    kinds = [type(layer).__name__ for layer in discriminator.layers]
    assert kinds.count("LeakyReLU") == 8 + 1 and kinds.count("BatchNormalization") == 7 and kinds.count("Dense") == 2
    strides = [layer.strides[0] for layer in discriminator.layers if isinstance(layer, keras.layers.Conv2D)]
    assert strides == [1, 2] * 4
    assert discriminator(np.zeros((3, 96, 96, 3), np.float32)).shape == (3, 1)
    assert generator(np.zeros((2, 7, 31, 3), np.float32)).shape == (2, 28, 124, 3)


def test_tail_is_the_papers_pixel_shuffle_prelu_and_convolution():
    rng = np.random.default_rng(0)
    tail = model.ShufflePReLUConv()
    tail.build((None, None, None, 256))
    alpha, kernel, bias = (rng.normal(0, 0.1, w.shape) for w in tail.weights)
    tail.set_weights([alpha, kernel, bias])
    x = rng.normal(0, 1, (2, 5, 7, 256)).astype(np.float32)
    shuffled = x.reshape(2, 5, 7, 2, 2, 64).transpose(0, 1, 3, 2, 4, 5).reshape(2, 10, 14, 64)
    conv = keras.layers.Conv2D(3, 9, padding="same")
    conv.build((None, None, None, 64))
    conv.set_weights([kernel, bias])
    np.testing.assert_allclose(tail(x), conv(np.where(shuffled > 0, shuffled, alpha * shuffled)), atol=1e-4)


def test_our_batch_normalization_computes_what_kerass_does():
    rng = np.random.default_rng(0)
    x = rng.normal(1, 2, (16, 24, 24, 8)).astype(np.float32)
    ours, kerass = layers = model.BatchNormalization(), keras.layers.BatchNormalization()
    for training in (True, False):
        for layer in layers:
            layer(x)  # builds it
            layer.set_weights(np.linspace(0.5, 1.5, 32).reshape(4, 8))
        np.testing.assert_allclose(ours(x, training=training), kerass(x, training=training), atol=1e-5)
        for a, b in zip(ours.get_weights(), kerass.get_weights()):
            np.testing.assert_allclose(a, b, rtol=1e-5)  # the variance of 9,216 values or of one less


def test_bfloat16_is_close_and_does_not_shift_colours():
    """Training would learn to make up for a shift, and the weights be wrong in float32."""
    lr = data.read_rgb(main.WEIGHTS.parents[1] / "input.jpg")[None].astype(np.float32)
    exact = model.load_generator(main.WEIGHTS.with_name("srresnet.weights.h5"))
    keras.config.set_dtype_policy("mixed_bfloat16")
    mixed = model.load_generator(main.WEIGHTS.with_name("srresnet.weights.h5"))
    sr, difference = mixed(lr), mixed(lr) - exact(lr)
    assert sr.dtype == tf.float32 and {w.dtype for w in mixed.weights} == {"float32"}
    assert 0 < np.abs(difference).mean() < 2 and np.abs(np.mean(difference, (0, 1, 2))).max() < 0.3  # grey levels


def test_files_without_good_weights_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "BLOCKS", 2)
    network, names = model.generator(), ("whole", "nan", "inf", "text", "other", "damaged")
    files = {name: tmp_path / f"{name}.weights.h5" for name in names}
    network.save_weights(files["whole"])
    whole = files["whole"].read_bytes()
    for name in ("nan", "inf"):
        network.get_layer("block2_norm1").moving_variance.assign(np.full(64, float(name)))
        network.save_weights(files[name])
    files["text"].write_text("no weights")
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save_weights(files["other"])
    files["damaged"].write_bytes(whole[:680] + bytes(255 - byte for byte in whole[680:688]) + whole[688:])
    for name in names[1:]:
        with pytest.raises(OSError, match=f"{name}.weights.h5 .*" + "not finite" * (name in ("nan", "inf"))):
            model.load_generator(files[name])
