"""Losses and metrics against values computed by hand or by NumPy alone."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_image

import losses


def test_mse_is_on_the_range_of_minus_one_to_one():
    hr = tf.fill((1, 4, 4, 3), 255.0)
    assert float(losses.mse_loss(hr, tf.zeros_like(hr))) == 4.0


def test_adversarial_losses_by_hand():
    logits_hr, logits_sr = tf.constant([[2.0], [-1.0]]), tf.constant([[0.5], [-3.0]])
    d_hr, d_sr = 1 / (1 + np.exp(-logits_hr.numpy())), 1 / (1 + np.exp(-logits_sr.numpy()))
    assert float(losses.adversarial_loss(logits_sr)) == pytest.approx(-np.log(d_sr).mean(), rel=1e-6)
    expected = -np.log(d_hr).mean() - np.log(1 - d_sr).mean()
    assert float(losses.discriminator_loss(logits_hr, logits_sr)) == pytest.approx(expected, rel=1e-6)


def test_adversarial_losses_do_not_saturate():
    sure = tf.constant([[-500.0]])
    assert float(losses.adversarial_loss(sure)) == 500
    assert float(losses.discriminator_loss(sure, -sure)) == 1000


def test_perceptual_loss():
    parts = map(tf.constant, (2.0, 5.0, 0.3, 0.1))
    assert float(losses.perceptual_loss(*parts)) == pytest.approx(2 + 0.015 + 3 + 3.2)


def test_artifact_loss_sees_specks_more_than_texture():
    """Of two errors with the same mean, the one in few pixels counts more; an even one doesn't count at all."""
    hr = np.full((1, 96, 96, 3), 100, np.float32)
    texture, specks = hr.copy(), hr.copy()
    texture[:, ::2, ::2] += 20
    specks[:, ::8, ::8] += 320
    assert np.abs(texture - hr).sum() == np.abs(specks - hr).sum()
    loss = [float(losses.artifact_loss(tf.constant(hr), tf.constant(sr))) for sr in (hr, hr + 20, texture, specks)]
    assert loss[0] == 0 and abs(loss[1]) < 1e-7 and loss[3] > 10 * loss[2] > 0


def test_artifact_loss_by_its_definition():
    rng = np.random.default_rng(0)
    hr, sr = np.float32(rng.uniform(0, 255, (2, 1, 20, 24, 3)))
    error = np.abs(hr - sr).sum(-1)[0] / 255
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(error, 3, "reflect"), (7, 7))
    expected = np.mean(windows.var((2, 3)) * error.var() ** 0.2 * error)
    assert float(losses.artifact_loss(tf.constant(hr), tf.constant(sr))) == pytest.approx(expected, rel=1e-4)


def test_colour_loss_sees_luma_and_grids_and_no_luma_texture():
    hr = tf.fill((1, 8, 8, 3), 100.0)
    assert float(losses.colour_loss(hr, hr + 12.75)) == pytest.approx(0.01 + 10 * 0.01)
    block = np.zeros((4, 4, 1))
    block[0, 0], block[2, 2] = 127.5, -127.5
    grid, texture = np.tile(block, (2, 2, 1)), np.block([[[block], [-block]], [[-block], [block]]])
    assert float(losses.colour_loss(hr, hr + grid[None])) == pytest.approx(10 * 2 / 16)
    assert float(losses.colour_loss(hr, hr + texture[None])) == pytest.approx(0)


@pytest.mark.parametrize("shift", [(2, -1, -1), (-1, 2, -1), (-1, -1, 2), (1, -1, 0)])
def test_colour_loss_sees_chroma_at_each_pixel(shift):
    """Even where the next pixel has the opposite error, which no mean over pixels sees."""
    checks = np.where(np.indices((8, 8)).sum(0) % 2, 1, -1)[..., None]
    hr = np.full((1, 8, 8, 3), 100, np.float32)
    sr = hr + np.float32(12.75 * checks * shift)
    assert float(losses.colour_loss(hr, sr)) == pytest.approx(5 * 0.01 * np.mean(np.square(shift)), rel=1e-5)


def test_vgg_features_are_the_networks_own(vgg_weights):
    """Against a convolution written out in NumPy: mean subtracted, BGR, 3x3 convolutions with ReLU, pooled, scaled."""
    import h5py

    with h5py.File(vgg_weights) as file:
        layers = [[file[f"layers/conv2d{n}/vars/{i}"][()] for i in (0, 1)] for n in ("", "_1", "_2", "_3")]
    x = make_image(0, 16, 16)[..., ::-1] - np.array([103.939, 116.779, 123.68])
    for i, (kernel, bias) in enumerate(layers):
        if i == 2:
            x = x.reshape(8, 2, 8, 2, 64).max((1, 3))
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (0, 1))  # h, w, channel, 3, 3
        x = np.maximum(np.einsum("hwcij,ijco->hwo", windows, kernel) + bias, 0)
    vgg = losses.vgg_features("block2_conv2", vgg_weights)
    features = vgg(make_image(0, 16, 16)[None].astype(np.float32))[0]
    np.testing.assert_allclose(features, x / 510, rtol=1e-3, atol=1e-5)
    assert not vgg.trainable_variables


def test_vgg54_has_the_papers_scale(tmp_path):
    """Section 3.2: features of block5_conv4 times 1/12.75. With all kernels 0 they are the last bias."""
    vgg = keras.applications.VGG19(include_top=False, weights=None)
    vgg.set_weights([np.zeros_like(w) if w.ndim == 4 else np.full_like(w, 3.0) for w in vgg.get_weights()])
    vgg.save_weights(tmp_path / "vgg.weights.h5")
    features = losses.vgg_features("block5_conv4", tmp_path / "vgg.weights.h5")(np.zeros((1, 32, 32, 3), np.float32))
    np.testing.assert_allclose(features, np.full((1, 2, 2, 512), 3 / 12.75), rtol=1e-6)


def test_vgg_in_bfloat16_compares_in_float32(vgg_weights):
    """Its rounding is small beside the distances that the loss measures."""
    hr, sr = (make_image(seed, 64, 64)[None].astype(np.float32) for seed in (0, 1))
    exact, rounded = (
        losses.vgg_features("block2_conv2", vgg_weights, precision) for precision in ("float32", "bfloat16")
    )
    assert rounded(hr).dtype == tf.float32
    assert (
        0 < float(losses.content_loss(exact(hr), rounded(hr))) < 1e-3 * float(losses.content_loss(exact(hr), exact(sr)))
    )


def test_vgg_of_keras_own_file(vgg_weights, tmp_path):
    """Keras's `notop` file is a VGG19 in its older format, and as good as the truncated one."""
    vgg = keras.applications.VGG19(include_top=False, weights=None)
    truncated = keras.Model(vgg.input, vgg.get_layer("block2_conv2").output)
    truncated.load_weights(vgg_weights)
    path = tmp_path / "vgg19_notop.h5"
    import h5py

    with h5py.File(path, "w") as file:  # the layout of keras.applications' files
        file.attrs["layer_names"] = [layer.name.encode() for layer in vgg.layers]
        for layer in vgg.layers:
            group = file.create_group(layer.name)
            group.attrs["weight_names"] = [f"{layer.name}/{w.name}:0".encode() for w in layer.weights]
            for w in layer.weights:
                group[f"{layer.name}/{w.name}:0"] = w.numpy()
    image = make_image(1, 32, 32)[None].astype(np.float32)
    expected = losses.vgg_features("block2_conv2", vgg_weights)(image)
    np.testing.assert_allclose(losses.vgg_features("block2_conv2", path)(image), expected, rtol=1e-5)


def test_vgg_file_that_is_too_shallow_or_no_weights(vgg_weights, tmp_path):
    with pytest.raises(ValueError, match="up to block3_conv4"):
        losses.vgg_features("block3_conv4", vgg_weights)
    for name in ("text.h5", "text.weights.h5"):
        (tmp_path / name).write_text("no weights")
        with pytest.raises((OSError, ValueError), match=name):
            losses.vgg_features("block2_conv2", tmp_path / name)


def test_vgg_download_that_fails_says_which_file_to_put_where(monkeypatch):
    def no_network(*args, **kwargs):
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.applications, "VGG19", no_network)
    with pytest.raises(OSError, match="vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5 into ~/.keras/models"):
        losses.vgg_features("block5_conv4")


def test_luma_of_known_colours():
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    np.testing.assert_allclose(losses.luma(colours)[0], [16, 235, 81.481, 144.553, 40.966], atol=1e-3)


def test_psnr_by_hand_and_without_the_border():
    hr = np.full((20, 20, 3), 100, np.uint8)
    sr = hr + 10  # Y differs by 10 * (65.481 + 128.553 + 24.966) / 255
    assert losses.psnr(sr, hr) == pytest.approx(20 * np.log10(255 / (10 * 219 / 255)), abs=1e-9)
    sr = hr.copy()
    sr[:4] = sr[-4:] = sr[:, :4] = sr[:, -4:] = 0
    assert losses.psnr(sr, hr) == np.inf
    sr[4, 4] = 0
    assert np.isfinite(losses.psnr(sr, hr))


def test_ssim_against_numpy():
    hr = make_image(0, 40, 36)
    sr = np.uint8(np.clip(hr + np.random.default_rng(0).normal(0, 12, hr.shape), 0, 255))
    gauss = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(gauss, gauss) / gauss.sum() ** 2
    a, b = (np.lib.stride_tricks.sliding_window_view(losses.luma(image)[4:-4, 4:-4], (11, 11)) for image in (sr, hr))

    def mean(x):
        return (x * window).sum((-1, -2))

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 2.55**2, 7.65**2
    expected = ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean()
    assert losses.ssim(sr, hr) == pytest.approx(expected, abs=1e-5)
    assert losses.ssim(hr, hr) == pytest.approx(1)
