"""Losses and metrics against values computed by hand or by NumPy alone."""

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_image

import losses

# ---- The paper's losses ----


def test_mse_loss_is_on_the_range_of_minus_1_to_1():
    white = tf.fill((1, 4, 4, 3), 255.0)
    black = tf.zeros((1, 4, 4, 3))
    assert float(losses.mse_loss(white, black)) == 4


def test_adversarial_and_discriminator_loss_by_hand():
    logits_hr = np.float32([[2], [-1]])
    logits_sr = np.float32([[0.5], [-3]])
    d_hr = 1 / (1 + np.exp(-logits_hr))
    d_sr = 1 / (1 + np.exp(-logits_sr))
    expected = -np.log(d_sr).mean()
    assert float(losses.adversarial_loss(logits_sr)) == pytest.approx(expected, rel=1e-6)
    expected = -np.log(d_hr).mean() - np.log(1 - d_sr).mean()
    assert float(losses.discriminator_loss(logits_hr, logits_sr)) == pytest.approx(expected, rel=1e-6)


def test_a_sure_discriminator_does_not_overflow():
    sure = tf.constant([[-500.0]])
    assert float(losses.adversarial_loss(sure)) == 500
    assert float(losses.discriminator_loss(sure, -sure)) == 1000


def first_features(image, vgg_weights):
    """VGG19's block2_conv2 in NumPy: mean subtracted, BGR, 3x3 convolutions with ReLU, pooled after two, scaled."""
    x = image[..., ::-1] - np.array([103.939, 116.779, 123.68])
    with h5py.File(vgg_weights) as file:
        for i, name in enumerate(("conv2d", "conv2d_1", "conv2d_2", "conv2d_3")):
            kernel = file[f"layers/{name}/vars/0"][()]
            bias = file[f"layers/{name}/vars/1"][()]
            if i == 2:
                x = x.reshape(8, 2, 8, 2, 64).max((1, 3))
            padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (0, 1))  # h, w, channel, 3, 3
            x = np.maximum(np.einsum("hwcij,ijco->hwo", windows, kernel) + bias, 0)
    return x / 510


def test_vgg_features_are_the_networks_own(vgg_weights):
    image = make_image(0, 16, 16)
    vgg = losses.vgg_features("block2_conv2", vgg_weights)
    features = vgg(np.float32(image[None]))[0]
    np.testing.assert_allclose(features, first_features(image, vgg_weights), rtol=1e-3, atol=1e-5)
    assert not vgg.trainable_variables


def test_vgg_features_in_bfloat16(vgg_weights):
    batch = np.float32(make_image(0, 16, 16)[None])
    features = losses.vgg_features("block2_conv2", vgg_weights)(batch)
    keras.config.set_dtype_policy("mixed_bfloat16")
    rounded = losses.vgg_features("block2_conv2", vgg_weights)(batch)
    assert rounded.dtype == tf.float32
    assert 0 < np.std(rounded - features) < 0.02 * np.std(features)


@pytest.fixture
def flat_vgg():
    """With all kernels 0, the features of VGG19 are the last bias, 3."""
    vgg = keras.applications.VGG19(include_top=False, weights=None)
    for weight in vgg.weights:
        value = 0 if "kernel" in weight.path else 3
        weight.assign(np.full(weight.shape, value))
    return vgg


def test_vgg54_has_the_papers_scale(flat_vgg, tmp_path):
    """Section 3.2: features of block5_conv4 times 1/12.75."""
    path = tmp_path / "vgg.weights.h5"
    flat_vgg.save_weights(path)
    features = losses.vgg_features("block5_conv4", path)(np.zeros((1, 32, 32, 3), np.float32))
    np.testing.assert_allclose(features, np.full((1, 2, 2, 512), 3 / 12.75), rtol=1e-6)


def test_vgg_needs_the_whole_file(flat_vgg, tmp_path):
    part = keras.Model(flat_vgg.input, flat_vgg.get_layer("block2_conv2").output)
    part.save_weights(tmp_path / "part.weights.h5")
    (tmp_path / "text.h5").write_text("no weights")
    for name in ("part.weights.h5", "text.h5", "nowhere.h5"):
        path = tmp_path / name
        with pytest.raises(OSError, match=f"^{path} doesn't hold VGG19's weights: give --vgg_weights .*notop.h5$"):
            losses.vgg_features("block2_conv2", path)


# ---- Additions ----


def colour_loss(difference):
    """Of images `(96, 96, 3)` that differ so."""
    hr = tf.fill((1, 96, 96, 3), 100.0)
    return float(losses.colour_loss(hr, hr + np.float32(difference)))


def test_mesh_loss_sees_a_mesh_and_no_even_texture():
    texture = np.float32(np.random.default_rng(0).normal(100, 20, (4, 96, 96, 3)))
    lines = np.zeros((1, 96, 96, 3), np.float32)
    lines[:, :, ::4] = 50
    assert losses.mesh_loss(tf.constant(texture)) < 0.01
    assert losses.mesh_loss(tf.fill((1, 96, 96, 3), 7.0)) == 0
    for mesh in (lines, lines.swapaxes(1, 2)):
        assert float(losses.mesh_loss(tf.constant(mesh))) == pytest.approx(1, rel=1e-3)
        assert float(losses.mesh_loss(tf.constant(texture + mesh))) > 0.2


def test_colour_loss_sees_brightness():
    assert colour_loss(12.75) == pytest.approx(0.01 + 10 * 0.01)


def test_colour_loss_sees_a_grid_and_no_texture():
    block = np.zeros((4, 4, 1))
    block[0, 0] = 127.5
    block[2, 2] = -127.5
    grid = np.tile(block, (24, 24, 1))
    texture = np.block([[[block], [-block]], [[-block], [block]]])
    assert colour_loss(grid) == pytest.approx(10 * 2 / 16)
    assert colour_loss(np.tile(texture, (12, 12, 1))) == pytest.approx(0)


def test_colour_loss_sees_a_grid_that_changes_its_sign_from_one_half_to_the_other():
    rows, columns = np.indices((96, 96))
    checks = np.where((rows + columns) % 2, 1, -1)
    mesh = np.where(columns < 48, checks, -checks)  # its mean over the patch is 0
    # Of the 19 windows from left to right, 14 lie in one half, and 5 hold 1 to 5 columns of the other.
    seen = 14 + sum(((6 - 2 * other) / 6) ** 2 for other in range(1, 6))
    assert colour_loss(12.75 * mesh[..., None]) == pytest.approx(10 * 0.01 * seen / 19, rel=1e-4)


@pytest.mark.parametrize("shift", [(2, -1, -1), (-1, 2, -1), (-1, -1, 2), (1, -1, 0)])
def test_colour_loss_sees_chroma_at_each_pixel(shift):
    """Even where the next one has the opposite error, which no mean over pixels sees."""
    checks = np.where(np.indices((96, 96)).sum(0) % 2, 1, -1)[..., None]
    expected = 10 * 0.01 * np.mean(np.square(shift)) / 2  # the mean of two axes
    assert colour_loss(12.75 * checks * shift) == pytest.approx(expected, rel=1e-5)


def test_gradient_penalty_is_the_squared_norm():
    gradients = np.zeros((2, 4, 4, 3), np.float32)
    gradients[0, 1, 2] = 2 / 127.5  # of three channels
    gradients[1, 0, 0, 1] = 4 / 127.5
    assert float(losses.gradient_penalty(gradients)) == pytest.approx((3 * 4 + 16) / 2)


# ---- Metrics ----


def test_luma_of_known_colours_and_of_one_channel():
    black_white_red_green_blue = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]
    colours = np.array([black_white_red_green_blue], np.uint8)
    np.testing.assert_allclose(losses.luma(colours)[0], [16, 235, 81.481, 144.553, 40.966], atol=1e-3)
    np.testing.assert_array_equal(losses.luma(colours[..., :1]), colours[..., 0])  # as it is, as in the papers' scripts


def test_psnr_by_hand():
    hr = np.full((20, 20, 3), 100, np.uint8)
    difference = 10 * 219 / 255  # of Y, for 10 more in each channel
    assert losses.psnr(hr + 10, hr) == pytest.approx(20 * np.log10(255 / difference), abs=1e-9)


def test_psnr_leaves_the_border_out():
    hr = np.full((20, 20, 3), 100, np.uint8)
    sr = np.zeros_like(hr)
    sr[4:-4, 4:-4] = 100
    assert losses.psnr(sr, hr) == np.inf
    sr[4, 4] = 0
    assert np.isfinite(losses.psnr(sr, hr))


def test_ssim_against_numpy():
    hr = make_image(0, 40, 36)
    noise = np.random.default_rng(0).normal(0, 12, hr.shape)
    sr = np.uint8(np.clip(hr + noise, 0, 255))
    gauss = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(gauss, gauss) / gauss.sum() ** 2

    def windows(image):
        return np.lib.stride_tricks.sliding_window_view(losses.luma(image)[4:-4, 4:-4], (11, 11))

    def mean(x):
        return (x * window).sum((-1, -2))

    a = windows(sr)
    b = windows(hr)
    mean_a = mean(a)
    mean_b = mean(b)
    variances = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    assert losses.ssim(sr, hr) == pytest.approx((luminance * structure).mean(), abs=1e-5)
