"""Losses and metrics against values computed by hand or by NumPy alone."""

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_image

import losses


def test_mse_and_adversarial_losses_by_hand():
    assert float(losses.mse_loss(tf.fill((1, 4, 4, 3), 255.0), tf.zeros((1, 4, 4, 3)))) == 4  # of -1 to 1
    logits_hr, logits_sr = tf.constant([[2.0], [-1.0]]), tf.constant([[0.5], [-3.0]])
    d_hr, d_sr = 1 / (1 + np.exp(-logits_hr.numpy())), 1 / (1 + np.exp(-logits_sr.numpy()))
    assert float(losses.adversarial_loss(logits_sr)) == pytest.approx(-np.log(d_sr).mean(), rel=1e-6)
    expected = -np.log(d_hr).mean() - np.log(1 - d_sr).mean()
    assert float(losses.discriminator_loss(logits_hr, logits_sr)) == pytest.approx(expected, rel=1e-6)
    sure = tf.constant([[-500.0]])  # without overflow
    assert float(losses.adversarial_loss(sure)) == 500
    assert float(losses.discriminator_loss(sure, -sure)) == 1000


def test_artifact_loss_by_its_definition():
    rng = np.random.default_rng(0)
    hr, sr = np.float32(rng.uniform(0, 255, (2, 1, 20, 24, 3)))
    error = np.abs(hr - sr).sum(-1)[0] / 255
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(error, 3, "reflect"), (7, 7))
    expected = np.mean(windows.var((2, 3)) * error.var() ** 0.2 * error)
    assert float(losses.artifact_loss(tf.constant(hr), tf.constant(sr))) == pytest.approx(expected, rel=1e-4)


def test_colour_loss_sees_luma_and_grids_and_chroma_and_no_luma_texture():
    hr = tf.fill((1, 8, 8, 3), 100.0)
    assert float(losses.colour_loss(hr, hr + 12.75)) == pytest.approx(0.01 + 10 * 0.01)
    block = np.zeros((4, 4, 1))
    block[0, 0], block[2, 2] = 127.5, -127.5
    grid, texture = np.tile(block, (2, 2, 1)), np.block([[[block], [-block]], [[-block], [block]]])
    assert float(losses.colour_loss(hr, hr + grid[None])) == pytest.approx(10 * 2 / 16)
    assert float(losses.colour_loss(hr, hr + texture[None])) == pytest.approx(0)
    # Chroma at each pixel, even where the next one has the opposite error, which no mean over pixels sees.
    checks = np.where(np.indices((8, 8)).sum(0) % 2, 1, -1)[..., None]
    for shift in ((2, -1, -1), (-1, 2, -1), (-1, -1, 2), (1, -1, 0)):
        loss = float(losses.colour_loss(hr, hr + np.float32(12.75 * checks * shift)))
        assert loss == pytest.approx(5 * 0.01 * np.mean(np.square(shift)), rel=1e-5)


def test_mesh_loss_of_even_texture_and_of_a_mesh():
    texture = np.float32(np.random.default_rng(0).normal(100, 20, (4, 96, 96, 3)))
    lines = np.float32(np.arange(96) % 4 == 0)[:, None]  # a step up and a step down in four
    assert float(losses.mesh_loss(tf.constant(texture))) < 0.01
    assert float(losses.mesh_loss(tf.fill((1, 96, 96, 3), 7.0))) == 0
    assert float(losses.mesh_loss(tf.constant(0 * texture + 50 * lines))) == pytest.approx(1, rel=1e-3)


def test_gradient_penalty_is_the_squared_norm():
    gradients = np.zeros((2, 4, 4, 3), np.float32)
    gradients[0, 1, 2], gradients[1, 0, 0, 1] = 2 / 127.5, 4 / 127.5
    assert float(losses.gradient_penalty(gradients)) == pytest.approx((3 * 4 + 16) / 2)


def test_vgg_features_are_the_networks_own(vgg_weights):
    """Against a convolution written out in NumPy: mean subtracted, BGR, 3x3 convolutions with ReLU, pooled, scaled."""
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
    keras.config.set_dtype_policy("mixed_bfloat16")
    rounded = losses.vgg_features("block2_conv2", vgg_weights)(make_image(0, 16, 16)[None].astype(np.float32))[0]
    assert rounded.dtype == tf.float32 and 0 < np.std(rounded - features) < 0.02 * np.std(features)


def test_vgg54_has_the_papers_scale_and_needs_the_whole_file(tmp_path):
    """Section 3.2: features of block5_conv4 times 1/12.75. With all kernels 0 they are the last bias."""
    vgg, path = keras.applications.VGG19(include_top=False, weights=None), tmp_path / "vgg.weights.h5"
    vgg.set_weights([np.zeros_like(w) if w.ndim == 4 else np.full_like(w, 3.0) for w in vgg.get_weights()])
    vgg.save_weights(path)
    features = losses.vgg_features("block5_conv4", path)(np.zeros((1, 32, 32, 3), np.float32))
    np.testing.assert_allclose(features, np.full((1, 2, 2, 512), 3 / 12.75), rtol=1e-6)
    keras.Model(vgg.input, vgg.get_layer("block2_conv2").output).save_weights(path)
    (tmp_path / "text.h5").write_text("no weights")
    for file in (path, tmp_path / "text.h5", tmp_path / "nowhere.h5"):
        with pytest.raises(OSError, match=f"{file.name}.*--vgg_weights.*notop.h5"):
            losses.vgg_features("block2_conv2", file)


def test_luma_of_known_colours_and_of_one_channel():
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    np.testing.assert_allclose(losses.luma(colours)[0], [16, 235, 81.481, 144.553, 40.966], atol=1e-3)
    np.testing.assert_array_equal(losses.luma(colours[..., :1]), colours[..., 0])  # as it is, as in the papers' scripts


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
