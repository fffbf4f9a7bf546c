"""Pictures in and out of files, DIV2K, and the patches that training reads (Ledig et al. 2017, section 3.2).

Pictures are uint8 arrays `(height, width, 3)`, RGB, unless a docstring says otherwise.
"""

from pathlib import Path

import numpy as np
from PIL import Image

SCALE = 4

# ---------------------------------------------------------------------------------------- pictures in and out of files


# ------------------------------------------------------------------------------------------------ the 4x degradation


def degrade(hr):
    """The 4x bicubic degradation of the benchmarks: `(4h, 4w, 3)` uint8 to `(h, w, 3)` uint8.

    Equal to MATLAB's `imresize(hr, 1/4)` more than 4 LR pixels from the edge. MATLAB rounds to uint8 between the
    vertical pass and the horizontal one, and so do two calls of Pillow, but not one.
    """
    height, width = hr.shape[:2]
    if height % SCALE or width % SCALE:
        raise ValueError(f"a picture to degrade needs sides that are multiples of {SCALE}, got {width}x{height}")
    image = Image.fromarray(hr)
    image = image.resize((width, height // SCALE), Image.Resampling.BICUBIC)
    return np.asarray(image.resize((width // SCALE, height // SCALE), Image.Resampling.BICUBIC))


def bicubic(lr):
    """The 4x bicubic interpolation that every result is compared with: `(h, w, 3)` uint8 to `(4h, 4w, 3)` uint8."""
    height, width = lr.shape[:2]
    return np.asarray(Image.fromarray(lr).resize((width * SCALE, height * SCALE), Image.Resampling.BICUBIC))


# ------------------------------------------------------------------------------------------------------------- DIV2K


# ------------------------------------------------------------------------------------- prepared pictures and patches
