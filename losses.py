"""The losses of Ledig et al. 2017, section 2.2, with three more, and the metrics PSNR and SSIM.

Losses take batches of RGB images, `(batch, height, width, 3)` float32 from 0 to 255, or what networks make of them, and
return a scalar. Metrics take two images, `(height, width, channels)` uint8.
"""

import os
import warnings

import keras
import numpy as np
import tensorflow as tf

# VGG19's features are scaled before they are compared (section 3.2). The paper's factor, 1/12.75, is for block5_conv4,
# its VGG54. The others bring the content loss of a pre-trained generator to about the same value, 0.07.
FEATURE_SCALES = {"block2_conv2": 1 / 510, "block3_conv4": 1 / 1600, "block5_conv4": 1 / 12.75}
VGG_FILE = "vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5"
VGG_URL = f"https://storage.googleapis.com/tensorflow/keras-applications/vgg19/{VGG_FILE}"
VGG_MD5 = "253f8cb515780f3b799900260a226db6"
BORDER = 4  # pixels at each side that the metrics leave out (section 3.1)


# ---- The paper's losses ----


def mse_loss(hr, sr):
    """Equation 4, on the paper's range of -1 to 1."""
    return tf.reduce_mean(tf.square((hr - sr) / 127.5))


def vgg_features(layer: str, weights=None) -> keras.Model:
    """The map phi of equation 5: VGG19 up to `layer` (after its ReLU), frozen, from images to scaled features.

    Those are `(batch, h / 2^k, w / 2^k, channels)` float32. `weights`: Keras's `notop` file, or None. Raises OSError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns of a file that doesn't fit, before it raises
            path = weights
            if path is None:  # where Keras keeps it: KERAS_HOME, which main.py sets, would hide it
                home = os.path.expanduser("~/.keras")
                path = keras.utils.get_file(VGG_FILE, VGG_URL, file_hash=VGG_MD5, cache_dir=home, cache_subdir="models")
            vgg = keras.applications.VGG19(include_top=False, weights=str(path))
    except Exception as error:  # Keras and h5py raise a dozen kinds on damaged files, and a bare Exception offline
        what = f"can't download VGG19's weights ({error})"
        if weights:
            what = f"{weights} doesn't hold VGG19's weights"
        raise OSError(f"{what}: give --vgg_weights the file {VGG_URL}") from error
    vgg = keras.Model(vgg.input, vgg.get_layer(layer).output)
    rgb = keras.Input((None, None, 3))
    features = vgg(keras.applications.vgg19.preprocess_input(rgb))
    features = keras.layers.Rescaling(FEATURE_SCALES[layer], dtype="float32")(features)
    return keras.Model(rgb, features, name="vgg_features", trainable=False)


def content_loss(features_hr, features_sr):
    """Equation 5: the mean squared difference of the feature maps."""
    return tf.reduce_mean(tf.square(features_hr - features_sr))


def adversarial_loss(logits_sr):
    """Equation 6: -log D(SR), low when the discriminator takes the generator's images for originals."""
    return tf.reduce_mean(tf.nn.softplus(-logits_sr))  # softplus(-x) is -log(sigmoid(x)), without overflow


def discriminator_loss(logits_hr, logits_sr):
    """Equation 2: -log D(HR) - log(1 - D(SR)), low when originals and generated images are told apart."""
    return tf.reduce_mean(tf.nn.softplus(-logits_hr)) + tf.reduce_mean(tf.nn.softplus(logits_sr))


# ---- Additions ----


def gradient_penalty(gradients):
    """R1 of Mescheder et al. 2018 (arXiv:1801.04406), for images from -1 to 1. Not in the SRGAN paper.

    `gradients`: of the logits of originals, all together, with respect to their pixels, `(batch, height, width, 3)`.
    R1 is half the squared norm for each image: here, the half is left to the weight. Through a discriminator with
    batch normalisation, an image's gradient also holds what it does to the logits of the others in the batch.
    """
    squared_norms = tf.reduce_sum(tf.square(gradients * 127.5), (1, 2, 3))
    return tf.reduce_mean(squared_norms)


def colour_loss(hr, sr):
    """Squared errors of chroma and of mean brightness, in the units of `mse_loss`. Sides: multiples of 4, at least 24.

    Not in the paper: VGG's features hardly see them. The chroma of each pixel keeps grey areas grey. The mean
    brightness of each 4x4 block, one pixel of LR, keeps images from turning darker; its mean over any 6x6 blocks at
    each of the 16 positions in a block keeps out a grid of 2 or 4 pixels.
    """
    difference = (hr - sr) / 127.5
    brightness = tf.reduce_mean(difference, 3, keepdims=True)
    chroma = difference - brightness  # (batch, h, w, 3), 0 for grey
    brightness = tf.nn.space_to_depth(brightness, 4)  # (batch, h / 4, w / 4, 16 positions)
    blocks = tf.reduce_mean(brightness, 3)
    positions = tf.nn.avg_pool2d(brightness, 6, 1, "VALID")
    loss = tf.reduce_mean(tf.square(blocks))
    loss += 5 * tf.reduce_mean(tf.square(chroma))  # with 1, a grey photograph kept a colour noise of 3.8 grey levels
    return loss + 10 * tf.reduce_mean(tf.square(positions))


def mesh_loss(sr):
    """How unevenly the differences of neighbouring pixels lie over the rows and columns of blocks of 4x4 pixels.

    Not in the paper. In photographs, they lie evenly: 0. Without a discriminator, the texture that the content loss
    asks for becomes a pattern in the 2x2 pixels of a pixel shuffle, a mesh on skin and water. A line in every fourth
    column of a flat image gives 1.
    """
    brightness = tf.reduce_mean(sr, 3)
    loss = 0.0
    for image in (brightness, tf.transpose(brightness, (0, 2, 1))):
        squares = tf.square(image[..., 1:-3] - image[..., :-4])  # without the last three, whose block isn't whole
        means = tf.reduce_mean(tf.reshape(squares, (-1, 4)), 0) + 0.1  # so that flat images have none
        loss += tf.reduce_mean(tf.square(means / tf.reduce_mean(means) - 1))
    return loss


# ---- Metrics ----


def luma(image):
    """BT.601's Y, 16 to 235, as MATLAB's rgb2ycbcr before rounding; one channel as it is: `(h, w)` float64."""
    if image.shape[-1] == 1:
        return image[..., 0].astype(float)
    return 16 + image @ [65.481, 128.553, 24.966] / 255


def scored(image):
    """Y without the border."""
    return luma(image)[BORDER:-BORDER, BORDER:-BORDER]


def psnr(sr, hr):
    """Peak signal-to-noise ratio of Y in dB, without 4 pixels at each side; inf if equal."""
    mse = np.mean(np.square(scored(sr) - scored(hr)))
    if mse == 0:
        return np.inf
    return 10 * np.log10(255**2 / mse)


def ssim(sr, hr):
    """Structural similarity of Y (Wang et al. 2004: 11x11 Gaussian window, sigma 1.5), without the same border."""
    return float(tf.image.ssim(scored(sr)[..., None], scored(hr)[..., None], max_val=255.0))
