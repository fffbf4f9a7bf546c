"""The networks are the paper's, and a fresh generator is an interpolation."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_image

import data
import losses
import main
import model


@pytest.fixture(scope="module")
def generator():
    keras.utils.set_random_seed(1)
    return model.generator()


@pytest.mark.parametrize("height, width", [(24, 24), (7, 31), (1, 1)])
def test_generator_takes_any_size(generator, height, width):
    sr = generator(np.zeros((2, height, width, 3), np.float32))
    assert sr.shape == (2, 4 * height, 4 * width, 3) and sr.dtype == tf.float32


def test_parameter_counts(generator):
    assert generator.count_params() == 1_554_883
    assert model.discriminator().count_params() == 23_569_217


def test_discriminator_returns_one_logit():
    assert model.discriminator()(np.zeros((3, 96, 96, 3), np.float32)).shape == (3, 1)


def test_networks_have_the_layers_of_figure_4(generator):
    kinds = [type(layer).__name__ for layer in generator.layers]
    assert kinds.count("Conv2D") == 1 + 16 * 2 + 1 + 2
    assert kinds.count("PReLU") == 1 + 16 + 1
    assert kinds.count("ShufflePReLUConv") == 1
    assert kinds.count("BatchNormalization") == 16 * 2 + 1
    strides = [layer.strides[0] for layer in model.discriminator().layers if isinstance(layer, keras.layers.Conv2D)]
    assert strides == [1, 2] * 4


def test_pixel_shuffle_puts_channels_where_the_paper_does():
    channels = np.arange(8, dtype=np.float32).reshape(1, 1, 1, 8)  # 2 channels in 4 phases
    shuffled = keras.ops.depth_to_space(channels, 2).numpy()[0]
    assert shuffled[..., 0].tolist() == [[0, 2], [4, 6]] and shuffled[..., 1].tolist() == [[1, 3], [5, 7]]


def test_tail_is_the_papers_pixel_shuffle_prelu_and_convolution():
    rng = np.random.default_rng(0)
    tail = model.ShufflePReLUConv()
    tail.build((None, None, None, 256))
    alpha, kernel, bias = (rng.normal(0, 0.1, w.shape) for w in tail.weights)
    tail.set_weights([alpha, kernel, bias])
    x = rng.normal(0, 1, (2, 5, 7, 256)).astype(np.float32)
    shuffled = tf.nn.depth_to_space(x, 2).numpy()
    conv = keras.layers.Conv2D(3, 9, padding="same")
    conv.build((None, None, None, 64))
    conv.set_weights([kernel, bias])
    np.testing.assert_allclose(tail(x), conv(np.where(shuffled > 0, shuffled, alpha * shuffled)), atol=1e-4)


def test_untrained_generator_upscales_like_bicubic(generator):
    ours, bicubic = [], []
    for seed in range(3):
        hr = make_image(seed, 192, 160)
        lr = data.degrade(hr)
        sr = generator(lr[None].astype(np.float32), training=False)[0]
        ours.append(losses.psnr(np.uint8(np.round(np.clip(sr, 0, 255))), hr))
        bicubic.append(losses.psnr(data.bicubic(lr), hr))
    assert np.mean(ours) > np.mean(bicubic) - 0.2


def test_bfloat16_computes_close_and_returns_float32(generator):
    lr = make_image(0, 24, 24)[None].astype(np.float32)
    mixed = model.generator("bfloat16")
    mixed.set_weights(generator.get_weights())
    sr = mixed(lr)
    assert sr.dtype == tf.float32 and {w.dtype for w in mixed.weights} == {"float32"}
    assert np.abs(sr - generator(lr)).mean() < 2  # grey levels


def test_bfloat16_does_not_shift_colours():
    """Training would learn to make up for it, and the weights be wrong in float32."""
    exact, mixed = model.generator(), model.generator("bfloat16")
    for network in (exact, mixed):
        model.load_weights(network, main.WEIGHTS / "srresnet.weights.h5")
    lr = data.read_rgb(main.WEIGHTS.parent / "input.jpg")[None, 30:62, 40:72].astype(np.float32)
    shift = np.mean(mixed(lr) - exact(lr), axis=(0, 1, 2))
    assert np.abs(shift).max() < 0.3  # grey levels


def test_weights_survive_a_file(generator, tmp_path):
    generator.save_weights(tmp_path / "a.weights.h5")
    other = model.generator()
    model.load_weights(other, tmp_path / "a.weights.h5")
    assert all(np.array_equal(a, b) for a, b in zip(generator.get_weights(), other.get_weights()))
    other.save_weights(tmp_path / "b.weights.h5")
    assert (tmp_path / "a.weights.h5").read_bytes() == (tmp_path / "b.weights.h5").read_bytes()


def test_weights_that_do_not_fit_are_one_clear_error(generator, tmp_path):
    (tmp_path / "text.weights.h5").write_text("no weights")
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save_weights(tmp_path / "other.weights.h5")
    generator.save_weights(tmp_path / "whole.weights.h5")
    whole = (tmp_path / "whole.weights.h5").read_bytes()
    for place in (8, 680, 1832):  # in the header: h5py raises OSError, RuntimeError, KeyError
        flipped = bytes(255 - byte for byte in whole[place : place + 8])
        (tmp_path / f"{place}.weights.h5").write_bytes(whole[:place] + flipped + whole[place + 8 :])
    for name in ("text", "other", 8, 680, 1832):
        with pytest.raises(ValueError, match="doesn't hold weights of the generator"):
            model.load_weights(generator, tmp_path / f"{name}.weights.h5")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    network = model.generator()
    network.get_layer("block3_norm1").moving_variance.assign(np.full(64, value))
    network.save_weights(tmp_path / "a.weights.h5")
    with pytest.raises(ValueError, match="not finite"):
        model.load_weights(network, tmp_path / "a.weights.h5")
