"""Image files, the 4x degradation, DIV2K, and the patches that training reads (Ledig et al. 2017, section 3.2).

Images are uint8 arrays `(height, width, 3)`, RGB, 0 to 255, unless a docstring says otherwise. What a user should know,
but nothing stops for, is a warning of one line.
"""

import contextlib
import functools
import hashlib
import http.client
import io
import os
import re
import shutil
import struct
import tempfile
import urllib.request
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin, features
from PIL.ExifTags import IFD, Base
from tqdm import tqdm

SCALE = 4
LR_PATCH = 24
HR_PATCH = SCALE * LR_PATCH


# ---- Files and folders ----

# What can be read and written, and Pillow's name of the format.
SUFFIXES = {".png": "PNG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"}
SUFFIXES |= dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG")
if "avif" in features.modules and features.check("avif"):  # since Pillow 11.3
    SUFFIXES[".avif"] = "AVIF"


class UserError(OSError):
    """What the user can mend, beside faults of files: printed, as any OSError, as one line without a traceback."""


def is_image(path):
    """Whether a path is a file with the suffix of an image."""
    return path.suffix.lower() in SUFFIXES and os.path.isfile(path)  # False, too, for a link to where nobody may look


def find_folder(folder, names):
    """The first of `names` that is a folder in `folder`, or None."""
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    return None


def first_image(folder):
    """An image in a folder, or in one below, if there is any."""
    return next(filter(is_image, folder.rglob("[!.]*")), None)


def list_folder(folder, used=()):
    """What is in a folder, by name, except hidden files and `used`."""
    return [path for path in sorted(folder.iterdir()) if path.name[0] != "." and path not in used]


def warn_of_unused(folder, paths):
    """Warn of the files and folders in `folder` that are not used: their number, and the names of five at most."""
    if paths:
        names = [path.name for path in paths[:5]]
        if len(paths) > 5:
            names.append("...")
        warnings.warn(f"{folder}: left out {len(paths)} of its files and folders: {', '.join(names)}")


def warn_of_unused_images(folder, used):
    """Warn of what holds images in `folder`, except `used`."""
    warn_of_unused(folder, [path for path in list_folder(folder, used) if is_image(path) or first_image(path)])


def list_images(folder: str | Path, *others: Path | None) -> list[Path]:
    """The images in `folder`, by name. Warns of what else is there, except `others`. Raises UserError if none are."""
    folder = Path(folder)
    paths = list_folder(folder, others)
    images = [path for path in paths if is_image(path)]
    if not images:
        deeper = first_image(folder)
        if deeper:
            raise UserError(f"no images in {folder}: there are some in {deeper.parent}")
        raise UserError(f"no images in {folder}: supported are {' '.join(sorted(SUFFIXES))}")
    warn_of_unused(folder, sorted({*paths} - {*images}))
    return images


def flock(file, shared=False, wait=True):
    """Lock an open file, for this process alone or shared. Returns False where there are no locks.

    Raises BlockingIOError if another process has locked it and `wait` is False.
    """
    try:
        import fcntl

        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):  # Windows, or a file system without locks
        return False
    return True


@contextlib.contextmanager
def lock(folder: str | Path, wait: bool = True):
    """Make the folder and lock it, or raise UserError if another process has and `wait` is False."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".lock", "a") as file:
        try:
            flock(file, wait=False)
        except BlockingIOError as error:
            if not wait:
                message = f"another process uses {folder}: wait until it ends, or choose another folder"
                raise UserError(message) from error
            warnings.warn(f"waiting for another process that uses {folder}")
            flock(file)
        yield


def check_replaceable(path):
    """Raise OSError if there is something at `path` that must not be replaced."""
    if path.exists() and not path.is_file():
        raise OSError("it is not a regular file")
    if path.exists() and not os.access(path, os.W_OK):
        raise OSError("it is write-protected")


@contextlib.contextmanager
def atomic_write(path: str | Path):
    """Yield a temporary path, moved to `path` at the end: written whole, or not at all.

    If `path` is a link, what it links to is replaced. A file without write permission is not. OSErrors, also those
    inside, name `path`.
    """
    target = Path(os.path.realpath(path))
    try:
        check_replaceable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        # In a private folder nobody else can write to the temporary file, or put a link in its place.
        with tempfile.TemporaryDirectory(".tmp", ".srgan-", target.parent) as folder:
            temporary = Path(folder) / Path(path).name
            yield temporary
            if temporary.is_file():
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, target)
    except OSError as error:
        raise OSError(f"can't write {path}: {error.strerror or error}") from error


# ---- Reading ----

Image.MAX_IMAGE_PIXELS = None  # large images are welcome
PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20  # so are long texts and colour profiles
PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20
TiffImagePlugin.READ_LIBTIFF = True  # Pillow's own reader takes planes of 16 bits for planes of 8
FORMATS = sorted(set(SUFFIXES.values()))  # no others: Pillow would start Ghostscript for a PostScript file

RARE = "its pixels are of a rare kind, such as 12 bits or float: save it as a PNG of 8 or 16 bits"

# The EXIF tags that still hold when an image is upscaled, and those in IFD.Exif that don't.
EXIF_TAGS = {Base.ImageDescription, Base.Make, Base.Model, Base.XResolution, Base.YResolution, Base.ResolutionUnit}
EXIF_TAGS |= {Base.Software, Base.DateTime, Base.Artist, Base.Copyright, IFD.Exif, IFD.GPSInfo}
NO_LONGER_HOLD = (Base.ExifImageWidth, Base.ExifImageHeight, IFD.Interop)
# How often to turn an image left (`np.rot90`), and the step along its columns, which mirrors it if negative.
TURNS = {2: (0, -1), 3: (2, 1), 4: (2, -1), 5: (3, -1), 6: (3, 1), 7: (1, -1), 8: (1, 1)}


def explain(error):
    """What an exception says, in one line."""
    if isinstance(error, MemoryError):
        return "out of memory"
    words = " ".join(str(getattr(error, "strerror", None) or error).split())
    if "unknown pixel mode" in words:  # Pillow's words
        return RARE
    if isinstance(error, (OSError, SyntaxError, ValueError)) and words:
        return words
    return f"it is damaged ({type(error).__name__}: {words})"  # decoders raise a dozen kinds


def hide_tags(content):
    """A TIFF in which EXIF, XMP and resolution have the number of a tag that means nothing."""
    hidden = bytearray(content)
    order = "<" if content.startswith(b"II") else ">"
    (directory,) = struct.unpack_from(order + "I", content, 4)
    (count,) = struct.unpack_from(order + "H", content, directory)
    for place in range(directory + 2, directory + 2 + 12 * count, 12):
        (tag,) = struct.unpack_from(order + "H", content, place)
        if tag in EXIF_TAGS or tag == TiffImagePlugin.XMP:
            struct.pack_into(order + "H", hidden, place, 65_000)
    return bytes(hidden)


def drop_chunks(content):
    """A PNG of its header, palette, transparency and pixels."""
    kept = [content[:8]]
    place = 8
    while place < len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + length + 12
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(content[place:end])
        place = end
    return b"".join(kept)


def hide_metadata(content):
    """The same file, with metadata hidden from Pillow, which gives no pixels if they are damaged."""
    if content.startswith((b"II*\0", b"MM\0*")):
        return hide_tags(content)
    if content.startswith(b"\x89PNG"):
        return drop_chunks(content)
    return content.replace(b"Exif", b"none").replace(b"Photoshop", b"nothing..")  # as JPEG and AVIF call them


def identify(content, load):
    """Pillow's image of a file's content, decoded if `load`. Raises any of a dozen kinds of exception."""
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    for name in ("icc_profile", "xmp"):  # which a TIFF may say are numbers
        if not isinstance(image.info.get(name), bytes):
            image.info.pop(name, None)
    if load:
        image.load()
    return image


def identify_or_explain(path, content, load):
    """The same, if need be without damaged metadata, of which it warns. What it raises says why."""
    try:
        return identify(content, load)
    except Exception as error:
        with contextlib.suppress(Exception):
            image = identify(hide_metadata(content), load)
            warnings.warn(f"{path} has damaged metadata, which are left out")
            return image
        if not isinstance(error, Image.UnidentifiedImageError):
            raise
    kind = SUFFIXES.get(path.suffix.lower())
    if kind:
        Image.OPEN[kind][0](io.BytesIO(content))  # raises why: "12-bit"
    raise OSError(f"not one of {' '.join(FORMATS)}")


@contextlib.contextmanager
def open_image(path: str | Path, load: bool = False):
    """Yield a file's content, and Pillow's image of it, decoded if `load`.

    All exceptions inside, except UserError, become OSErrors of one line: that this file can't be read, and why.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a regular file")
        content = path.read_bytes()
        yield content, identify_or_explain(path, content, load)
    except UserError:
        raise
    except Exception as error:
        raise OSError(f"can't read {path}: {explain(error)}") from error


def decode_png_16(content, image):
    """The pixels and perhaps alpha of a PNG of 16 bits, of which Pillow keeps 8."""
    import tensorflow as tf

    if "transparency" not in image.info:  # of one colour
        return tf.io.decode_png(content, dtype=tf.uint16).numpy()
    rgba = tf.io.decode_png(content, 4, tf.uint16).numpy()
    colour_type = content[25]
    return rgba[..., 2:] if colour_type == 0 else rgba  # grey and alpha, or RGBA


def decode(path, content, image):
    """The pixels and perhaps alpha, uint8 or uint16, of a loaded image."""
    if image.format == "PNG":
        depth, colour_type = content[24:26]
        if depth == 16:
            return decode_png_16(content, image)
        if depth < 8 and colour_type == 0 and "transparency" in image.info:
            grey = int.from_bytes(content.partition(b"\0\0\0\2tRNS")[2][:2])
            image.info["transparency"] = grey * 255 // (2**depth - 1)  # as Pillow does with the pixels only
    deep = image.mode.startswith("I;16")
    if image.format == "TIFF":
        depth = max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (8,)))
        black_is_zero = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 1
        if deep and not (depth == 16 and black_is_zero):
            raise OSError(RARE)
        if depth > 8 and not deep:
            warnings.warn(f"{path} has {depth}-bit colour, of which 8 are read: convert it to PNG to keep 16")
    if image.mode in ("I", "F"):
        raise OSError(RARE)
    if deep:
        return np.asarray(image, np.uint16)
    if image.mode == "CMYK" and "icc_profile" in image.info:
        with contextlib.suppress(ImageCms.PyCMSError):  # the profile is damaged, or not for CMYK
            profile = io.BytesIO(image.info["icc_profile"])
            image = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
        mode += "A"
    return np.asarray(image.convert(mode))


# The codes of PNG's cICP and AVIF's nclx for what looks like sRGB: BT.709 and its like, sRGB, or not told.
PRIMARIES = (1, 2)
TRANSFERS = (1, 2, 6, 13, 14, 15)
SRGB_GAMMA = 0.45455
SRGB_CHROMATICITY = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)


def is_srgb(content, image):
    """Whether a file's pixels are to be shown as sRGB, or by a colour profile."""
    info = image.info
    if "icc_profile" in info:
        return True
    codes = b""
    if image.format == "PNG":
        header = content[: content.find(b"IDAT")]
        codes = header.partition(b"\0\0\0\4cICP")[2][:2]
    elif image.format == "AVIF":
        codes = content.partition(b"colrnclx")[2][1:4:2]
    if len(codes) == 2:
        return codes[0] in PRIMARIES and codes[1] in TRANSFERS
    if image.format != "PNG" or "srgb" in info:
        return True
    numbers = (info.get("gamma", SRGB_GAMMA), *info.get("chromaticity", SRGB_CHROMATICITY))
    return np.allclose(numbers, (SRGB_GAMMA, *SRGB_CHROMATICITY), atol=0.01)


def count_frames(content):
    """How many frames or pages a file has. Of a JPEG, one: what cameras put behind it are previews."""
    with contextlib.suppress(Exception):  # damaged
        image = Image.open(io.BytesIO(content), formats=FORMATS)  # opened anew, as counting moves on to the last page
        if image.format != "MPO":
            return getattr(image, "n_frames", 1)
    return 1


def warn_of_losses(path, content, image):
    """Warn of what a file says or holds and reading leaves out."""
    frames = count_frames(content)
    if frames > 1:
        warnings.warn(f"{path} has {frames} frames or pages: only the first is read")
    if not is_srgb(content, image):
        warnings.warn(f"{path} has colours other than sRGB, and no profile to keep: they may look different")


def read_orientation(exif):
    """How to turn an image upright: quarter turns to the left, and then the step along its columns, -1 to mirror it."""
    with contextlib.suppress(Exception):  # damaged
        return TURNS.get(exif.get(Base.Orientation), (0, 1))
    return (0, 1)


def read_metadata(image, exif, channels):
    """What holds for an upscaled image, too, and isn't damaged: the arguments of Pillow's `save`.

    They are `icc_profile`, `dpi` and `exif`.
    """
    metadata = {}
    icc = image.info.get("icc_profile", b"")
    if icc[16:20] == (b"GRAY" if channels == 1 else b"RGB "):  # that of CMYK has been used
        metadata["icc_profile"] = icc
    with contextlib.suppress(Exception):  # there is none, or it is damaged
        horizontal, vertical = map(float, image.info["dpi"])
        if 1 < horizontal < 65_535 and 1 < vertical < 65_535:
            metadata["dpi"] = (horizontal, vertical)
    with contextlib.suppress(Exception):
        exif.bigtiff = False  # whose form is for its own files only
        details = exif.get_ifd(IFD.Exif)
        for tag in NO_LONGER_HOLD:
            details.pop(tag, None)
        for tag in exif.keys() - EXIF_TAGS:
            del exif[tag]
        if exif and len(exif.tobytes()) <= 65_533:  # the most that a JPEG holds
            metadata["exif"] = exif.tobytes()
    return metadata


def read_image(path: str | Path) -> tuple[np.ndarray, np.ndarray | None, dict]:
    """Read an image, the first of several, upright: pixels, alpha or None, and metadata. Raises OSError, in one line.

    Pixels are `(h, w, 3)` RGB or `(h, w, 1)` grey, uint8 or, except from colour TIFF, uint16; alpha is `(h, w)`. The
    metadata are what `write_image` takes. What is damaged of them is left out.
    """
    with open_image(path, load=True) as (content, image):
        warn_of_losses(path, content, image)
        exif = Image.Exif()
        with contextlib.suppress(Exception):  # damaged
            exif = image.getexif()  # Pillow turns a TIFF upright by itself, and removes the orientation here
        pixels = decode(path, content, image)
        turns, mirror = read_orientation(exif)
        pixels = np.atleast_3d(np.rot90(pixels, turns)[:, ::mirror])
        channels = 1 if pixels.shape[2] < 3 else 3
        metadata = read_metadata(image, exif, channels)
        metadata["lossless"] = image.format == "WEBP" and b"VP8L" in content
    alpha = None
    if pixels.shape[2] > channels:
        alpha = pixels[..., -1].copy()
    return np.ascontiguousarray(pixels[..., :channels]), alpha, metadata


def to_8_bit(values: np.ndarray) -> np.ndarray:
    """uint16, 0 to 65535, as uint8, 0 to 255, rounded; uint8 as it is."""
    if values.dtype == np.uint8:
        return values
    return np.uint8((values.astype(np.uint32) + 128) // 257)


def to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Grey, `(..., 1)`, as RGB, `(..., 3)`; RGB as it is."""
    if pixels.shape[-1] == 3:
        return pixels
    return np.repeat(pixels, 3, axis=-1)


def read_rgb(path: str | Path) -> np.ndarray:
    """Read any image as upright RGB, `(h, w, 3)` uint8, without its alpha. Raises OSError, in one line."""
    pixels, _, _ = read_image(path)
    return to_rgb(to_8_bit(pixels))


# ---- Writing ----

LONGEST_SIDE = {"JPEG": 65_500, "WEBP": 16_383, "AVIF": 32_768}  # libjpeg's is a little less than JPEG's own
NO_ALPHA = ("JPEG", "BMP")
# Of zlib. Beside its default, 6, an upscaled photograph takes a third of the time and is 3 % smaller; an upscaled
# drawing takes half of it and is 6 % larger; one of flat areas alone .7 and 40 %; with 16 bits, .65 to .9 and 0 to 2 %.
PNG_LEVEL = 3


def check_output(path: str | Path, width: int, height: int):
    """Raise UserError if an image of this size, upscaled, can't be written to a file of this name."""
    kind = SUFFIXES.get(Path(path).suffix.lower())
    if kind is None:
        raise UserError(f"can't write {path}: the name of an image ends in one of {' '.join(sorted(SUFFIXES))}")
    width *= SCALE
    height *= SCALE
    too_long = max(width, height) > LONGEST_SIDE.get(kind, 2**31 - 1)
    too_large = kind in ("TIFF", "BMP") and 4 * width * height > 2**32 - 2**20  # bytes
    if too_long or too_large:
        raise UserError(f"can't write {path}: {width}x{height} is more than a {kind} holds, choose .png")
    try:
        check_replaceable(Path(os.path.realpath(path)))
    except OSError as error:
        raise UserError(f"can't write {path}: {error}") from error


def spread_colours(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Give transparent pixels of `(h, w, channels)` the colour of visible ones nearby, since their own would bleed."""
    visible = (alpha > 0)[..., None]
    if visible.all() or not visible.any():
        return pixels
    height, width, _ = pixels.shape
    # The means of the visible pixels in blocks of 2x2, with the number of them as alpha, and so on.
    blocks = np.dstack([pixels * visible, visible])
    blocks = np.pad(blocks, ((0, height % 2), (0, width % 2), (0, 0)))
    blocks = blocks.reshape(-(-height // 2), 2, -(-width // 2), 2, -1).sum((1, 3), np.float32)
    counts = blocks[..., -1]
    colours = blocks[..., :-1] / np.maximum(counts, 1)[..., None]
    colours = spread_colours(colours, counts).repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    return np.where(visible, pixels, colours).astype(pixels.dtype)


def keeps_16_bits(kind, pixels, alpha):
    """Whether a format, by Pillow's name, takes these pixels in 16 bits."""
    height, width, channels = pixels.shape
    if kind == "TIFF":
        return channels == 1 and alpha is None
    return kind == "PNG" and height * width <= 500e6  # TensorFlow's limit


def encode(path, kind, pixels, alpha, metadata):
    """Write to a file, in a format by Pillow's name, what that can hold. Raises any of a dozen kinds of exception."""
    channels = pixels.shape[2]
    if pixels.dtype == np.uint16 and kind == "PNG":  # of which Pillow writes only 8 bits
        import tensorflow as tf

        if alpha is not None:
            pixels = np.dstack([pixels, alpha])
        path.write_bytes(tf.io.encode_png(pixels, PNG_LEVEL).numpy())
        return
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    if alpha is not None and kind in NO_ALPHA:
        image = Image.composite(image, Image.new(image.mode, image.size, "white"), Image.fromarray(alpha))
    elif alpha is not None:
        image.putalpha(Image.fromarray(alpha))
    if channels == 1 and kind in ("WEBP", "AVIF"):  # which are always RGB
        metadata = metadata | {"icc_profile": None}
    image.save(path, kind, quality=95, subsampling="4:4:4", compress_level=PNG_LEVEL, **metadata)


def write_image(path: str | Path, pixels: np.ndarray, alpha: np.ndarray | None = None, metadata: dict = {}):
    """Write `read_image`'s pixels, alpha and metadata in the format of the path's suffix, one of SUFFIXES.

    Raises OSError, in one line. Warns if the format has no alpha, so white is put behind the image, or no 16 bits.
    Several threads may write and read at once.
    """
    kind = SUFFIXES[Path(path).suffix.lower()]
    if pixels.dtype == np.uint16 and not keeps_16_bits(kind, pixels, alpha):
        warnings.warn(f"{path} is written with 8 of the image's 16 bits: .png keeps them, up to 500 megapixels")
        pixels = to_8_bit(pixels)
        if alpha is not None:
            alpha = to_8_bit(alpha)
    if alpha is not None and kind in NO_ALPHA and alpha.min() < 255:
        warnings.warn(f"{path} can't hold transparency: the image is put on white")
    with atomic_write(path) as temporary:
        try:
            encode(temporary, kind, pixels, alpha, metadata)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # encoders, too, raise a dozen kinds
            raise OSError(f"{type(error).__name__}: {error}") from error


# ---- Resampling ----


def degrade(hr: np.ndarray) -> np.ndarray:
    """The 4x degradation: `(H, W, 3)` to `(H // 4, W // 4, 3)`, as MATLAB's `imresize` but for 4 LR pixels at edges."""
    height = hr.shape[0] // SCALE
    width = hr.shape[1] // SCALE
    image = Image.fromarray(hr).crop((0, 0, SCALE * width, SCALE * height))
    # As MATLAB: first the height, rounded, then the width. Pillow would begin with the width.
    image = image.resize((SCALE * width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def bicubic(image: np.ndarray) -> np.ndarray:
    """The 4x bicubic interpolation: `(h, w, 3)` to `(4h, 4w, 3)`; also of alpha, `(h, w)` uint8 or uint16."""
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(image).resize((SCALE * width, SCALE * height), Image.Resampling.BICUBIC))


# ---- Pairs to score ----

LR_FOLDERS = ("LR_x4", "LR", "LR_bicubic/X4", "LR_bicubic")
LR_ENDINGS = ("x4", "_x4", "_LR", "")
SMALLEST = 2 * 4 + 11  # the border that scores leave out, and the window of SSIM


def find_lr_folder(folder, prefix):
    """The folder of the small images, or None. Raises UserError if there seems to be one, of another name."""
    lr_folder = find_folder(folder, [prefix + name for name in LR_FOLDERS])
    if lr_folder:
        return lr_folder
    for path in list_folder(folder):
        seems_lr = re.match(f"{prefix}(.*[_-])?LR", path.name, re.IGNORECASE)
        if seems_lr and first_image(path):
            raise UserError(f"{path} has images, but another name than {prefix}LR_x4: rename it, or move it away")
    return None


def find_lr(hr_path, lr_paths):
    """The small image of an original, of those by name."""
    name = hr_path.stem.removesuffix("_HR")
    for ending in LR_ENDINGS:
        lr_path = lr_paths.get(name + ending)
        if lr_path not in (None, hr_path):
            return lr_path
    return None


def scoring_pairs(folder: str | Path) -> list[tuple[str, Path, Path | None]]:
    """The images to score on: `(name, HR path, LR path or None)`. Raises UserError if only some have an LR.

    `folder` holds the HR, or `HR/`, and perhaps the LR, beside them or in `LR_x4/`, `LR/` or `LR_bicubic/X4/`; DIV2K's
    folders have its name before that. The LR of X.png or X_HR.png is X.png, Xx4.png, X_x4.png or X_LR.png. Where there
    are names with _HR, as in SelfExSR, images with neither are the results of other programs. Warns of what isn't used.
    """
    folder = Path(folder)
    hr_folder = find_folder(folder, ["DIV2K_valid_HR", "DIV2K_train_HR", "HR"])
    prefix = hr_folder.name.removesuffix("HR") if hr_folder else ""
    lr_folder = find_lr_folder(folder, prefix)
    used = [hr_folder]
    if lr_folder:
        used += [lr_folder, lr_folder.parent]
    if hr_folder:
        warn_of_unused_images(folder, used)
    images = list_images(hr_folder or folder, *used)
    originals = [path for path in images if path.stem.endswith("_HR")]
    if not originals:
        originals = [path for path in images if lr_folder or not path.stem.endswith("_LR")]
    lr_paths = list_images(lr_folder) if lr_folder else images
    lr_by_name = {path.stem: path for path in lr_paths}
    partners = {path: find_lr(path, lr_by_name) for path in originals}

    # Of images in one folder, an LR is no original; what is neither, and has no LR's name, is another program's result.
    small = set(partners.values())
    pairs = [(path.stem, path, lr_path) for path, lr_path in partners.items() if path not in small]
    alone = [path for _, path, lr_path in pairs if lr_path is None]
    if len(alone) == len(pairs) and not lr_folder:
        alone = []  # none has an LR
    results = []
    for path in sorted({*images, *lr_paths} - partners.keys() - small):
        if path.parent == lr_folder or path.stem.endswith("_LR"):
            alone.append(path)
        else:
            results.append(path)
    if alone:
        raise UserError(f"{alone[0]} has no partner: HR and LR images go by name, and all have one, or none has")
    warn_of_unused(folder, results)
    return pairs


def read_pair(hr_path: str | Path, lr_path: str | Path | None) -> tuple[np.ndarray, np.ndarray]:
    """LR `(h, w, 3)`, made from HR if it has no file, and HR `(4h, 4w, 3)`, or `(4h, 4w, 1)` if its file is grey.

    Raises UserError if they don't fit or are too small to score, and OSError, in one line.
    """
    hr = to_8_bit(read_image(hr_path)[0])
    height, width = hr.shape[:2]
    if min(height, width) < SMALLEST:
        raise UserError(f"{hr_path} is too small to score: {width}x{height}")
    lr = read_rgb(lr_path) if lr_path else degrade(to_rgb(hr))
    h, w = lr.shape[:2]
    if (h, w) != (height // SCALE, width // SCALE):
        raise UserError(f"{lr_path} is {w}x{h}, and a quarter of {hr_path} is {width // SCALE}x{height // SCALE}")
    return lr, hr[: SCALE * h, : SCALE * w]


# ---- DIV2K ----

# The archives of the HR images, their bytes and sha256. The LR are made by `degrade`.
DIV2K_URL = "https://data.vision.ee.ethz.ch/cvl/DIV2K/"
DIV2K = {
    "DIV2K_train_HR": (3530603713, "9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335"),
    "DIV2K_valid_HR": (448993893, "20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc"),
}


def download(url, path, size):
    """Download a file, or what is missing of it. Raises OSError, in one line."""
    here = path.stat().st_size if path.exists() else 0
    if here >= size:
        return
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={here}-"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            if answer.status != 206:
                here = 0  # the server sends all of it
            with open(path, "ab" if here else "wb") as file:
                bar = {"desc": path.name, "initial": here, "total": size, "disable": None}
                with tqdm.wrapattr(file, "write", **bar) as out:
                    shutil.copyfileobj(answer, out)
        if path.stat().st_size < size:
            raise OSError("the connection ended early")
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"can't download {url} ({error}): run the command again, or train on other photos") from error


def div2k(root: Path) -> Path:
    """The folder with DIV2K's HR images, downloaded on first use, or continued. Raises OSError."""
    with lock(root):
        for name, (size, sha256) in DIV2K.items():
            if (root / name).is_dir():
                continue
            archive = root / f"{name}.zip"
            part = root / f"{name}.zip.part"
            if not archive.exists():  # the user may have put it there
                download(f"{DIV2K_URL}{name}.zip", part, size)
                archive = part
            with open(archive, "rb") as file:
                damaged = hashlib.file_digest(file, "sha256").hexdigest() != sha256
            if damaged and archive == part:
                part.unlink()
                raise OSError(f"{part} was not the published archive, and has been removed: run the same command again")
            if damaged:
                raise UserError(f"{archive} is not the published archive: remove it, and run the same command again")
            print(f"extracting {archive}", flush=True)
            shutil.unpack_archive(archive, root / "unpacking", "zip")
            (root / "unpacking" / name).rename(root / name)  # so a folder that exists is whole
            part.unlink(missing_ok=True)
    return root


# ---- Prepared images ----

# Decoding a 2K image for every patch would starve the training. So each image becomes one .npy file, mapped into
# memory: uint8 `(17, h, w, 3)`, LR and then HR, 16 times as large. Its name is a digest of what it was made from. The
# files made from one folder are a store, whose name is the folder's, with a digest of its path.
PREPARED = 1  # the version of their form, part of the digest
# Each takes a file descriptor, of which other code needs some, too, and one of Linux's 65,530 maps.
DESCRIPTORS = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else 2048
IN_USE = {}  # by store, the open file whose shared lock keeps its images until this process ends


@functools.lru_cache(min(max(DESCRIPTORS - 256, 64), 32_000))
def open_prepared(path):
    """LR and HR of a prepared file, mapped into memory."""
    array = np.load(path, mmap_mode="r").view(np.ndarray)
    return array[0], array[1:].reshape(SCALE * array.shape[1], -1, 3)


def digest(value):
    """A hash of what a value looks like when printed: 32 characters."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:32]


class PreparedImages:
    """Images mapped into memory: `images[i]` is LR `(h, w, 3)` and HR `(4h, 4w, 3)`, `sizes[i]` LR's h and w.

    `files` are their prepared files, by the original; `names`, those of the originals. `fingerprint` is the same for
    the same images, wherever they lie.
    """

    def __init__(self, files: dict[Path, Path]):
        self.names = [path.name for path in files]
        self.paths = [str(path) for path in files.values()]
        self.sizes = np.array([lr.shape[:2] for lr, _ in self])
        self.fingerprint = digest([lr[len(lr) // 2].tobytes() for lr, _ in self])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return open_prepared(self.paths[i])


def clean_store(store, needed):
    """Remove what nobody needs, unless a process uses the store: images not `needed`, and what killed processes left.

    Call it with the store locked, so that nobody begins to use it, or prepares images, meanwhile. Returns an open file:
    lock it, shared, for as long as the store is used.
    """
    in_use = open(store / ".in_use", "a+")
    with contextlib.suppress(BlockingIOError):
        if flock(in_use, wait=False):
            for path in set(store.glob("*.npy")) - needed:
                path.unlink()
            for folder in store.glob(".srgan-*.tmp"):
                shutil.rmtree(folder, ignore_errors=True)
    return in_use


def is_whole(path):
    """Whether a prepared file is there and not damaged."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        np.load(path, mmap_mode="r")
        return True
    return False


def prepare_image(job):
    """Decode and degrade an original, and write it to a target. Returns why it can't be used, or None."""
    original, target = job
    try:
        hr = read_rgb(original)
    except OSError as error:
        return str(error)
    height, width = hr.shape[:2]
    if min(height, width) < HR_PATCH:
        return f"{original} is smaller than a patch of {HR_PATCH}x{HR_PATCH}: {width}x{height}"
    lr = degrade(hr)
    hr = hr[: SCALE * lr.shape[0], : SCALE * lr.shape[1]]
    with atomic_write(target) as temporary:
        np.save(temporary, np.concatenate([lr[None], hr.reshape(-1, *lr.shape)]))
    return None


def prepare(folder, cache, *others):
    """Prepare a folder's images, except `others`; reuse what is prepared. Returns the files of the usable ones."""
    resolved = folder.resolve()
    store = cache / "prepared" / f"{resolved.name[:40]}-{digest(str(resolved))[:8]}"
    files = {}
    for path in list_images(folder, *others):
        about = path.stat()
        files[path] = store / f"{digest((PREPARED, path.name, about.st_size, about.st_mtime_ns))}.npy"
    total = len(files)
    with lock(store):
        (store / "folder").write_bytes(os.fsencode(resolved))
        if store not in IN_USE:
            IN_USE[store] = clean_store(store, set(files.values()))
            flock(IN_USE[store], shared=True)
        # Not in the threads: Python 3.11's ast, which reads the files' headers, fails there.
        todo = {path: target for path, target in files.items() if not is_whole(target)}
        with ThreadPool(min(os.cpu_count(), 16)) as pool:
            results = pool.imap(prepare_image, todo.items())
            problems = list(tqdm(results, "preparing images", len(todo), disable=None))
    for path, problem in zip(todo, problems):
        if problem:
            warnings.warn(f"left out: {problem}")
            del files[path]
    if not files:
        raise UserError(f"{folder} has no usable images (of {total}): each needs {HR_PATCH}x{HR_PATCH} pixels")
    return files


def clean_stale_stores(cache):
    """Empty the stores of folders that are gone, unless they are in use."""
    for note in cache.glob("prepared/*/folder"):
        try:
            os.stat(note.read_bytes())
        except FileNotFoundError:
            with contextlib.suppress(OSError), lock(note.parent, wait=False):
                clean_store(note.parent, set()).close()
        except OSError:
            pass  # another user's


def find_cache(cache_dir):
    """The folder for DIV2K and the prepared images: as given, or beside the program, or in the user's cache folder."""
    folders = [Path(__file__).resolve().parent / "data"]
    users = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(users):  # it is not for a user without a home
        folders.append(Path(users) / "srgan")
    if cache_dir:
        folders = [Path(cache_dir)]
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
        except OSError as error:
            why = error.strerror
    raise UserError(f"can't write to {folder} ({why}): choose another cache folder")


def load(data_dir: str | Path | None = None, cache_dir: str | Path | None = None):
    """The images to train on and to validate with, two PreparedImages. Raises OSError.

    `data_dir` holds `train/` and `valid/` (`val/`, `validation/`), or DIV2K's folders, or just images, a few of which,
    always the same, validate. None: DIV2K, downloaded on first use. It and the prepared images lie in `cache_dir`, or
    else in `data/` beside the program, or, where that can't be written, in the user's cache folder.
    """
    cache = find_cache(cache_dir)
    clean_stale_stores(cache)
    folder = Path(data_dir) if data_dir else div2k(cache / "DIV2K")
    train_folder = find_folder(folder, ["DIV2K_train_HR", "train"])
    valid_folder = find_folder(folder, ["DIV2K_valid_HR", "valid", "val", "validation"])
    if train_folder:
        warn_of_unused_images(folder, [train_folder, valid_folder])
    files = prepare(train_folder or folder, cache, valid_folder)
    if valid_folder:
        return PreparedImages(files), PreparedImages(prepare(valid_folder, cache))
    if len(files) < 2:
        raise UserError(f"{folder} needs at least 2 usable images, one of them for validation, but has {len(files)}")
    # A hash of the name decides which 3 % (1 to 10 images) validate, so adding an image moves at most one other.
    paths = sorted(files, key=lambda path: hashlib.sha256(os.fsencode(path.name)).digest())
    count = min(max(len(paths) * 3 // 100, 1), 10)
    train = {path: files[path] for path in sorted(paths[count:])}
    valid = {path: files[path] for path in sorted(paths[:count])}
    return PreparedImages(train), PreparedImages(valid)


# ---- Patches ----

VISIT_PIXELS = 400 * 400  # an epoch of training visits an image once per this many HR pixels


def turn(square, way):
    """Flip and turn a square, `(n, n)`, in one of the eight ways, 0 to 7."""
    if way & 1:
        square = square[::-1]
    if way & 2:
        square = square[:, ::-1]
    if way & 4:
        square = square.T
    return square


def patches(images: PreparedImages, batch_size: int, first_step: int, last_step: int, seed: int, jpeg=None):
    """A `tf.data.Dataset` of the batches of the steps after `first_step` up to `last_step`, uint8.

    They are LR `(n, 24, 24, 3)` and HR `(n, 96, 96, 3)`, and depend on `seed`, `batch_size` and the step alone, so a
    continued run has no state to restore. An epoch visits the images in random order, large ones more than once, each
    time at a random place, flipped and turned. With `jpeg`, as "70-95", half of the LR are saved in such qualities.
    """
    import tensorflow as tf

    block = 1
    side = LR_PATCH
    if jpeg:  # which needs the whole blocks that a patch lies in, wherever that is
        block = 16
        side = 48
    areas = images.sizes.prod(axis=1) * SCALE**2
    visits = np.repeat(np.arange(len(images)), np.maximum(areas // VISIT_PIXELS, 1))
    # Where in a flat window of side x side pixels the pixels of a patch are, by the way it is turned.
    positions = np.arange(side * side, dtype=np.int32).reshape(side, side)[:LR_PATCH, :LR_PATCH]
    turned = np.stack([turn(positions, way).ravel() for way in range(8)])

    @functools.lru_cache(2)
    def order(epoch):
        return np.random.default_rng([seed, 0, epoch]).permutation(visits)

    def draw(step):
        """For each patch: its image, its top and left in LR pixels, how to turn it, and its JPEG quality or 0."""
        numbers = np.arange(batch_size) + (step - 1) * batch_size
        epochs, places = divmod(numbers, len(visits))
        chosen = np.array([order(epoch)[place] for epoch, place in zip(epochs, places)])
        rng = np.random.default_rng([seed, 1, step])
        tops, lefts = rng.integers(0, images.sizes[chosen].T - LR_PATCH, endpoint=True)
        ways = rng.integers(0, 8, batch_size)
        qualities = np.zeros(batch_size, np.int32)
        if jpeg:
            low, high = map(int, jpeg.split("-"))
            compressed = rng.integers(0, 2, batch_size)
            qualities[:] = compressed * rng.integers(low, high, batch_size, endpoint=True)
        return chosen, tops, lefts, ways, qualities

    def cut(step):
        """Windows of the LR that hold the patches, the HR patches, qualities, and where in a window the patch is."""
        chosen, tops, lefts, ways, qualities = draw(step)
        windows = np.empty((batch_size, side, side, 3), np.uint8)
        hrs = np.empty((batch_size, HR_PATCH, HR_PATCH, 3), np.uint8)
        for n in range(batch_size):
            lr, hr = images[chosen[n]]
            top = tops[n]
            left = lefts[n]
            window = lr[top - top % block :, left - left % block :][:side, :side]
            if window.shape[:2] != (side, side):  # JPEG, too, repeats the image's edge
                rows, columns = window.shape[:2]
                window = np.pad(window, ((0, side - rows), (0, side - columns), (0, 0)), "edge")
            windows[n] = window
            hr = hr[SCALE * top :, SCALE * left :][:HR_PATCH, :HR_PATCH]
            for channel in range(3):  # a third of the time that all at once take
                hrs[n, ..., channel] = turn(hr[..., channel], ways[n])
        places = turned[ways] + np.int32(tops % block * side + lefts % block)[:, None]
        return windows, hrs, qualities, places

    def compress(windows, qualities):
        """Save and read those windows as JPEG that have a quality."""
        chosen = tf.where(qualities > 0)[:, 0]

        def save_and_read(n):
            return tf.image.adjust_jpeg_quality(windows[n], qualities[n], dct_method="INTEGER_ACCURATE")  # as Pillow

        spec = tf.TensorSpec((side, side, 3), tf.uint8)
        compressed = tf.map_fn(save_and_read, chosen, parallel_iterations=1, fn_output_signature=spec)
        return tf.tensor_scatter_nd_update(windows, chosen[:, None], compressed)

    def crop_and_turn(windows, hrs, qualities, places):
        """Compress, crop and turn LR; set both shapes, which `numpy_function` loses."""
        windows = tf.reshape(windows, (batch_size, side, side, 3))
        if jpeg:
            windows = compress(windows, qualities)
        lrs = tf.gather(tf.reshape(windows, (batch_size, side * side, 3)), places, batch_dims=1)
        lrs = tf.reshape(lrs, (batch_size, LR_PATCH, LR_PATCH, 3))
        return lrs, tf.reshape(hrs, (batch_size, HR_PATCH, HR_PATCH, 3))

    def cut_in_python(step):
        return tf.numpy_function(cut, [step], (tf.uint8, tf.uint8, tf.int32, tf.int32), stateful=False)

    options = tf.data.Options()
    options.threading.private_threadpool_size = os.cpu_count()  # on a CPU, TensorFlow does one operation at a time
    steps = tf.data.Dataset.range(first_step + 1, last_step + 1).with_options(options)
    cuts = steps.map(cut_in_python, num_parallel_calls=1, deterministic=True)
    return cuts.map(crop_and_turn, num_parallel_calls=os.cpu_count(), deterministic=True).prefetch(4)
