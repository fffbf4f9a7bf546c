"""Pictures in and out of files, DIV2K, and the patches that training reads (Ledig et al. 2017, section 3.2).

Pictures are uint8 arrays `(height, width, 3)`, RGB, unless a docstring says otherwise.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import http.client
import io
import json
import os
import shutil
import struct
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms
from tqdm import tqdm

SCALE = 4
LR_PATCH, HR_PATCH = 24, 96
FOLDER = Path(__file__).resolve().parent / "data"  # DIV2K and the prepared pictures

# ---------------------------------------------------------------------------------------- pictures in and out of files

# What the program takes from a folder. Pillow's name of each format that it writes, and the longest side there
# (libjpeg stops a little before JPEG's own 65,535).
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
FORMATS = {
    ".png": ("PNG", 2**31 - 1),
    ".jpg": ("JPEG", 65_500),
    ".jpeg": ("JPEG", 65_500),
    ".webp": ("WEBP", 16_383),
    ".bmp": ("BMP", 2**31 - 1),
    ".tif": ("TIFF", 2**31 - 1),
    ".tiff": ("TIFF", 2**31 - 1),
}
TEMPORARY = ".srgan-"  # how the names of unfinished files begin
WITHOUT_ALPHA = {"JPEG", "BMP"}
SAVE_OPTIONS = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}  # subsampling 0: chroma at 4:4:4

# EXIF that is still true of an upscaled picture: description, camera, resolution, software, date, artist, copyright,
# and Windows's title, comment, author, keywords and subject. The rest describes how the old file was laid out.
EXIF_TAGS = {270, 271, 272, 282, 283, 296, 305, 306, 315, 33432, *range(0x9C9B, 0x9CA0)}
EXIF_ORIENTATION, EXIF_DETAILS, EXIF_GPS = 0x0112, 0x8769, 0x8825
EXIF_WIDTH, EXIF_HEIGHT, EXIF_INTEROPERABILITY = 0xA002, 0xA003, 0xA005  # in EXIF_DETAILS


@contextlib.contextmanager
def atomic_write(path):
    """Yield the name of a new file beside `path`, which takes its place at the end: written whole or not at all.

    The file is created with a random name that nobody could have planted a link at. What killed processes left in the
    folder more than an hour ago is removed.
    """
    path = Path(path)
    for left in path.parent.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    handle, name = tempfile.mkstemp(path.name[-11:], TEMPORARY, path.parent)  # Keras wants the end .weights.h5
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@dataclasses.dataclass
class ImageData:
    """What is kept of a picture between reading and writing."""

    pixels: np.ndarray  # (h, w, 3) RGB or (h, w, 1) grey, uint8 or uint16
    alpha: np.ndarray | None = None  # (h, w) of the same type, 0: transparent
    exif: Image.Exif | None = None
    icc: bytes | None = None


def list_images(folder):
    """The pictures in `folder`, not below it, by name: a sorted list of paths."""
    return sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def read_rgb(path):
    """Any picture as upright RGB, `(h, w, 3)` uint8, without its alpha. Raises ValueError if it can't be read."""
    pixels = read_image(path).pixels
    if pixels.dtype == np.uint16:
        pixels = to_8_bit(pixels)
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2)


def read_image(path):
    """Any picture that Pillow can read, upright. Returns a `ImageData`; grey stays grey and 16-bit stays 16-bit.

    Warns (`warnings.warn`) where something is left behind: all but the first frame, depth beyond 8-bit in colour TIFF.
    Raises ValueError, in one line that names the file, if it is no picture, or damaged.
    """
    try:
        with Image.open(path) as image:
            return _decode(image, path)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture") from error
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged files
        raise ValueError(f"can't read the picture {path}: {getattr(error, 'strerror', None) or error}") from error


def _decode(image, path):
    icc = image.info.get("icc_profile")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a camera's JPEG with previews attached
        warnings.warn(f"{path} has {image.n_frames} frames: only the first is taken")
    with open(path, "rb") as file:
        png_16_bit = image.format == "PNG" and file.read(25)[24] == 16  # the bit depth
    if (
        image.format == "TIFF"
        and image.mode in ("L", "LA", "RGB", "RGBA", "CMYK")
        and max(image.tag_v2.get(258, (8,))) > 8
    ):
        warnings.warn(f"{path} has {max(image.tag_v2[258])}-bit colour, of which 8 are taken: give a PNG to keep 16")

    image.load()
    exif = image.getexif()  # of a TIFF, Pillow has already applied the orientation, and taken it out of here
    if png_16_bit and image.mode != "I;16":  # Pillow reduces colour to 8 bits
        import tensorflow as tf

        pixels = tf.io.decode_png(Path(path).read_bytes(), dtype=tf.uint16).numpy()
    elif image.mode.startswith("I;16"):
        pixels = np.asarray(image).astype(np.uint16)[..., None]
    elif image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no fixed white: save it with 8 or 16 bits")
    else:
        image, icc = _plain(image, icc)
        pixels = np.asarray(image)
        pixels = pixels.reshape(*pixels.shape[:2], -1)  # grey is (h, w) from Pillow

    pixels = _upright(pixels, exif.get(EXIF_ORIENTATION, 1))
    channels = pixels.shape[2]
    alpha = np.ascontiguousarray(pixels[..., -1]) if channels in (2, 4) else None
    pixels = np.ascontiguousarray(pixels[..., :3] if channels >= 3 else pixels[..., :1])
    return ImageData(pixels, alpha, exif, icc)


def _plain(image, icc):
    """A picture of any 8-bit mode as L, LA, RGB or RGBA, and its ICC profile if that still describes it."""
    if image.mode in ("CMYK", "LAB"):
        source = ImageCms.ImageCmsProfile(io.BytesIO(icc)) if icc and image.mode == "CMYK" else None
        if image.mode == "LAB":
            source = ImageCms.createProfile("LAB")
        if source:
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB"), None
        return image.convert("RGB"), None
    grey = image.mode in ("1", "L", "LA", "La")
    if image.mode in ("P", "PA"):
        colours = np.reshape(image.getpalette("RGB"), (-1, 3))
        grey = (colours == colours[:, :1]).all()
    alpha = image.has_transparency_data
    return image.convert(("L" if grey else "RGB") + ("A" if alpha else "")), icc


def _upright(pixels, orientation):
    """Undo EXIF's orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def to_8_bit(values):
    return np.uint8((values.astype(np.uint32) + 128) // 257)


def spread_colours(pixels, alpha):
    """The pixels of `(h, w, channels)` that `alpha` hides in full, in the mean colour of the visible ones nearby.

    What lies there is arbitrary, often black, and would bleed into the edges of what is visible.
    """
    return _fill(pixels.astype(np.float32), alpha > 0).astype(pixels.dtype) if (alpha == 0).any() else pixels


def _fill(colours, known):
    """Fill what is not `known` from half the resolution, and that likewise."""
    if known.all() or not known.any():
        return colours
    height, width, channels = colours.shape
    even = ((0, height % 2), (0, width % 2))
    blocks = np.pad(colours * known[..., None], (*even, (0, 0)))
    blocks = blocks.reshape(blocks.shape[0] // 2, 2, blocks.shape[1] // 2, 2, channels).sum((1, 3))
    counts = np.pad(known, even).reshape(blocks.shape[0], 2, blocks.shape[1], 2).sum((1, 3))
    coarse = _fill(blocks / np.maximum(counts, 1)[..., None].astype(np.float32), counts > 0)
    coarse = coarse.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    return np.where(known[..., None], colours, coarse)


def enlarge_alpha(alpha):
    """4x bicubic: `(h, w)` uint8 or uint16 to `(4h, 4w)`."""
    height, width = alpha.shape
    return np.asarray(Image.fromarray(alpha).resize((width * SCALE, height * SCALE), Image.Resampling.BICUBIC))


def check_output(path, width=0, height=0):
    """Raises ValueError or OSError if a picture of this size can't be written to `path`, as far as that can be known."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        kinds = " ".join(sorted(FORMATS))
        raise ValueError(f"can't write {path}: the name of a picture ends in one of {kinds}")
    if path.is_dir():
        raise IsADirectoryError(f"can't write {path}: it is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"can't write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"can't write {path}: the folder {path.parent} is read-only")
    kind, longest = FORMATS[path.suffix.lower()]
    if max(width, height) > longest:
        raise ValueError(f"can't write {path}: {width}x{height} is more than the {longest:,} pixels a side of a {kind}")
    stored_raw = kind in ("BMP", "TIFF")
    size = width * height * 3
    if stored_raw and size >= 2**32:
        raise ValueError(f"can't write {path}: {width}x{height} is more than the 4 GB of a {kind}")
    free = shutil.disk_usage(path.parent).free
    if free < (size if stored_raw else size // 100):  # no photograph is compressed further
        raise OSError(f"can't write {path}: {free / 1e6:.0f} MB are free there, too little for {width}x{height} pixels")


def write_image(path, picture):
    """Write a `ImageData` in the format that the name's extension says, all of it or nothing.

    Goes to a temporary file beside `path`, which then takes its place. Warns where the format keeps less than the
    picture has: no alpha (it is flattened on white), 8 bits. Raises OSError or ValueError.
    """
    path = Path(path)
    kind, _ = FORMATS[path.suffix.lower()]
    pixels, alpha = picture.pixels, picture.alpha
    height, width, channels = pixels.shape
    if pixels.dtype == np.uint16 and not (kind == "PNG" or (kind == "TIFF" and channels == 1 and alpha is None)):
        warnings.warn(f"{path} holds 8 of the picture's 16 bits: give a .png to keep all")
        pixels, alpha = to_8_bit(pixels), None if alpha is None else to_8_bit(alpha)
    if alpha is not None and kind in WITHOUT_ALPHA:
        if alpha.min() < np.iinfo(alpha.dtype).max:
            warnings.warn(f"{path} can't be transparent: put on white")
            white, cover = Image.new("RGB", (width, height), "white"), Image.fromarray(alpha)
            white.paste(_image(pixels).convert("RGB"), mask=cover)
            pixels = np.asarray(white if channels == 3 else white.getchannel(0)).reshape(pixels.shape)
        alpha = None

    # The profile of a colour picture doesn't describe a grey one, nor the other way round; WebP has no grey.
    icc = picture.icc
    if icc and icc[16:20] != (b"GRAY" if channels == 1 and kind != "WEBP" else b"RGB "):
        icc = None
    exif = _exif_for(picture.exif, width, height, path)
    if len(exif) > 65_533 and kind == "JPEG":
        warnings.warn(f"{path}: {len(exif):,} bytes of EXIF are more than a JPEG holds, left out")
        exif = b""

    temporary = path.with_name(f".{os.getpid()}.upscaling")
    try:
        with open(temporary, "wb") as file:
            if pixels.dtype == np.uint16 and kind == "PNG":
                _write_png_16_bit(file, pixels, alpha, exif, icc)
            else:
                metadata = {"icc_profile": icc} | ({"exif": exif} if exif else {})
                _image(pixels, alpha).save(file, kind, **metadata, **SAVE_OPTIONS.get(kind, {}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _image(pixels, alpha=None):
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
    if alpha is not None:
        image.putalpha(Image.fromarray(alpha))
    return image


def _exif_for(old, width, height, path):
    """What is still true of `old` in a picture of this size, as bytes; b"" if nothing is."""
    if not old:
        return b""
    try:
        new = Image.Exif()
        for tag in EXIF_TAGS.intersection(old):
            new[tag] = old[tag]
        details = new.get_ifd(EXIF_DETAILS)
        details.update(old.get_ifd(EXIF_DETAILS))
        details.pop(EXIF_INTEROPERABILITY, None)
        if details:
            details |= {EXIF_WIDTH: width, EXIF_HEIGHT: height}
        new.get_ifd(EXIF_GPS).update(old.get_ifd(EXIF_GPS))
        return new.tobytes() if len(new) or details or new.get_ifd(EXIF_GPS) else b""
    except Exception:  # Pillow raises a dozen kinds on damaged EXIF
        warnings.warn(f"{path}: the EXIF of its original is damaged, left out")
        return b""


def _write_png_16_bit(file, pixels, alpha, exif, icc):
    """Write a PNG of 16 bits a channel, which Pillow can't, to an open file. Rows go out in blocks, to save memory."""

    def chunk(kind, content):
        body = kind + content
        file.write(struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body)))

    height, width, channels = pixels.shape
    kind = {1: 0, 3: 2}[channels] + (0 if alpha is None else 4)
    file.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    if icc:
        chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc))
    if exif:
        chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))
    deflate = zlib.compressobj()
    above = 0
    for top in range(0, height, 64):
        rows = pixels[top : top + 64]
        if alpha is not None:
            rows = np.concatenate([rows, alpha[top : top + 64, :, None]], axis=-1)
        rows = rows.astype(">u2").view(np.uint8).reshape(len(rows), -1)
        filtered = np.empty((len(rows), 1 + rows.shape[1]), np.uint8)
        filtered[:, 0] = 2  # "Up": each byte less the one above it
        filtered[0, 1:] = rows[0] - above
        filtered[1:, 1:] = rows[1:] - rows[:-1]
        above = rows[-1]
        chunk(b"IDAT", deflate.compress(filtered))
    chunk(b"IDAT", deflate.flush())
    chunk(b"IEND", b"")


def scoring_pairs(folder):
    """The pictures to score on: a list of `(name, hr path, lr path or None)`, by name.

    `folder` holds HR pictures, or `HR/` and perhaps `LR_x4/`, whose files have the same names or end in `x4`.
    Raises ValueError if there are none, or an LR is missing.
    """
    folder = Path(folder)
    has_hr = (folder / "HR").is_dir()
    hr_paths = list_images(folder / "HR" if has_hr else folder)
    if not hr_paths:
        raise ValueError(f"no pictures in {folder / 'HR' if has_hr else folder}")
    if not (has_hr and (folder / "LR_x4").is_dir()):
        return [(path.stem, path, None) for path in hr_paths]
    lr_paths = {path.stem.removesuffix("x4"): path for path in list_images(folder / "LR_x4")}
    for path in hr_paths:
        if path.stem not in lr_paths:
            raise ValueError(f"{path} has no LR picture of that name in {folder / 'LR_x4'}")
    return [(path.stem, path, lr_paths[path.stem]) for path in hr_paths]


def read_pair(hr_path, lr_path):
    """LR and HR to score on, `(h, w, 3)` and `(4h, 4w, 3)` uint8. LR is made from HR if `lr_path` is None.

    HR loses the rows and columns beyond a multiple of 4. Raises ValueError if the sizes don't go together.
    """
    hr = read_rgb(hr_path)
    height, width = (side // SCALE for side in hr.shape[:2])
    hr = np.ascontiguousarray(hr[: height * SCALE, : width * SCALE])
    if min(hr.shape[:2]) < 2 * 4 + 11:  # the border that scores leave out, and the window of SSIM
        raise ValueError(f"{hr_path} is too small to score")
    lr = degrade(hr) if lr_path is None else read_rgb(lr_path)
    if lr.shape[:2] != (height, width):
        raise ValueError(f"{lr_path} is {lr.shape[1]}x{lr.shape[0]}, and a quarter of {hr_path} is {width}x{height}")
    return lr, hr


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

# The HR archives are enough: `degrade` makes the LR. As {name: (first picture, last picture, bytes, sha256)}.
DIV2K_URL = "https://data.vision.ee.ethz.ch/cvl/DIV2K/"
DIV2K = {
    "DIV2K_train_HR": (1, 800, 3530603713, "9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335"),
    "DIV2K_valid_HR": (801, 900, 448993893, "20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc"),
}
WAITS = (1, 4, 15, 60)  # seconds before trying again; they begin anew when more has arrived
TIMEOUT = 30  # seconds without a byte until a connection counts as broken
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def download_div2k():
    """The folder with DIV2K's HR pictures, those that are missing downloaded into it.

    Wherever it was cut off, the next call goes on. It deletes only its own `*.part` and `*.unpacking`. Raises OSError
    or ValueError if the archives cannot be had, are not the published ones, or do not fit on the disk.
    """
    root = FOLDER / "DIV2K"
    ours = [root / f"{name}{end}" for name in DIV2K for end in (".zip.part", ".unpacking")]
    if any(_missing(root / name) for name in DIV2K) or any(path.exists() for path in ours):
        with _alone_in(root):
            sizes = {name: size for name, (_, _, size, _) in DIV2K.items() if _missing(root / name)}
            there = sum(file.stat().st_size for name in sizes for file in root.glob(f"{name}.zip*"))
            # As large as the archives are their unpacked pictures, and about as large again the prepared ones.
            _check_room(root, 3 * sum(sizes.values()) - there, "DIV2K and its prepared pictures")
            for name in DIV2K:
                if name in sizes:
                    _unpack(_fetch(root, name), root / name)
                (root / f"{name}.zip.part").unlink(missing_ok=True)
                shutil.rmtree(root / f"{name}.unpacking", ignore_errors=True)
    return root


def _missing(folder):
    """The pictures that are not in it: a folder that merely exists is not complete."""
    first, last, _, _ = DIV2K[folder.name]
    files = [folder / f"{number:04}.png" for number in range(first, last + 1)]
    return [file for file in files if not file.is_file() or not file.stat().st_size]


def _fetch(root, name):
    """The path of the whole, checked archive: `name.zip` if the user put it there, else the downloaded `name.zip.part`."""
    _, _, size, sha256 = DIV2K[name]
    given, part, url = root / f"{name}.zip", root / f"{name}.zip.part", f"{DIV2K_URL}{name}.zip"
    if given.exists():
        if _sha256(given) != sha256:
            raise ValueError(
                f"{given} is not the published archive of {size} bytes, sha256 {sha256}: replace or remove it"
            )
        return given
    waits, most = iter(WAITS), 0
    while True:
        continued = part.exists()
        try:
            _download(url, part, size)
            if _sha256(part) == sha256:
                return part
            part.unlink()
            if not continued:
                raise ValueError(f"{url} is not the published archive: expected sha256 {sha256}")
            raise OSError("what was continued came out damaged")
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in UNWRITABLE:
                raise
            here = part.stat().st_size if part.exists() else 0
            if here > most:
                waits, most = iter(WAITS), here
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 429)
            wait = None if refused else next(waits, None)
            if wait is None:
                archives = " and ".join(f"{name}.zip" for name in DIV2K)
                raise OSError(
                    f"cannot download {url} ({error}): try again to go on from {here / 1e6:.0f} MB, put {archives} "
                    f"into {root} yourself, or train on pictures of your own (--data_dir)"
                ) from None
            print(f"{url}: {error}; trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)


def _download(url, part, size):
    """Continue `part` up to `size` bytes. Raises OSError or HTTPException if the connection or the server fails."""
    here = part.stat().st_size if part.exists() else 0
    if here == size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={here}-"} if 0 < here < size else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        if answer.status != 206:
            here = 0  # the server sends all of it
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {here}-"):
            raise OSError(f"asked for the bytes from {here} on, got {answer.headers.get('Content-Range')}")
        offered = here + int(answer.headers.get("Content-Length", size - here))
        if offered != size:
            raise OSError(f"the server offers {offered} bytes instead of {size}")
        bar = tqdm(desc=part.stem, initial=here, total=size, unit="B", unit_scale=True, disable=None)
        with open(part, "ab" if here else "wb") as file, bar:
            while here < size and (data := answer.read1(min(size - here, 1 << 20))):
                file.write(data)
                here += len(data)
                bar.update(len(data))
    if here < size:
        raise OSError(f"the connection ended after {here} of {size} bytes")


def _sha256(file):
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _unpack(archive, folder):
    """Put the archive's pictures into `folder`, those that it lacks if it exists; whole ones, moved there at the end."""
    temporary = folder.with_name(f"{folder.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)
    with zipfile.ZipFile(archive) as file:
        for name in file.namelist():
            if "\\" in name or not (temporary / name).resolve().is_relative_to(temporary.resolve()):
                raise ValueError(f"{archive} holds {name!r}, outside of its folder: not unpacked")
        for name in tqdm(file.namelist(), f"unpacking {folder.name}", unit="file", disable=None):
            file.extract(name, temporary)
    if not folder.exists():
        (temporary / folder.name).rename(folder)
    for picture in _missing(folder):
        (temporary / folder.name / picture.name).replace(picture)


@contextlib.contextmanager
def _alone_in(folder):
    """Make the folder and keep other processes out: with several workers one downloads or prepares, the others wait."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "a") as lock:
            with contextlib.suppress(ImportError):  # not on Windows
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        reason = "DIV2K and prepared pictures are kept there, so it must be writable and have room"
        raise OSError(f"cannot write to {folder} ({error.strerror}): {reason}") from None


def _check_room(folder, needed, what):
    """Raises OSError if fewer than `needed` bytes are free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{what} need {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free: make room first"
        )


# ------------------------------------------------------------------------------------- prepared pictures and patches

# Decoding a 2K picture for every patch would starve the training. So a folder of pictures becomes one file, once:
# the pixels of all pictures (HR, then LR, of one after the other), then an index as JSON, then its length in 8 bytes.
FORMAT = 1
PARTS_OF_A_HUNDRED, MOST_VALID = 3, 10  # of a plain folder, for validation


class PreparedImages:
    """Prepared pictures, memory-mapped: `pictures[i]` is `(lr, hr)`.

    `lr` is `(h, w, 3)` and `hr` `(4h, 4w, 3)`, uint8, read-only views of the file. `names` holds the file names and
    `sizes`, `(len, 2)`, each h and w.
    """

    def __init__(self, pixels, records):
        self.pixels = pixels
        self.records = records  # [name, h, w, where its pixels start]
        self.names = [record[0] for record in records]
        self.sizes = np.array([record[1:3] for record in records], int).reshape(-1, 2)

    @property
    def fingerprint(self):
        return hashlib.sha256(json.dumps(self.records).encode()).hexdigest()

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        _, h, w, start = self.records[i]
        middle = start + SCALE * h * SCALE * w * 3
        hr = self.pixels[start:middle].reshape(SCALE * h, SCALE * w, 3)
        return self.pixels[middle : middle + h * w * 3].reshape(h, w, 3), hr


def load(data_dir=None):
    """The pictures to train on and to validate with: two `PreparedImages`, prepared on first use.

    `data_dir`: a folder with `train/` and `valid/`, or with `DIV2K_train_HR/` and `DIV2K_valid_HR/`, or just with
    pictures, of which a few, always the same, are kept for validation. None: DIV2K, downloaded on first use.
    Raises OSError or ValueError where pictures are missing, or cannot be downloaded or stored.
    """
    folder = Path(data_dir) if data_dir else download_div2k()
    for train, valid in (("DIV2K_train_HR", "DIV2K_valid_HR"), ("train", "valid")):
        if (folder / train).is_dir():
            train = prepare(folder / train)
            return (train, prepare(folder / valid)) if (folder / valid).is_dir() else _split(train, folder)
    return _split(prepare(folder), folder)


def _split(pictures, folder):
    """Keep 3 in a hundred for validation, 1 to 10. The names alone decide which, so that one more picture moves no other."""
    if len(pictures) < 2:
        raise ValueError(
            f"{folder} needs at least 2 usable pictures, one of them for validation, and has {len(pictures)}"
        )
    count = min(max(len(pictures) * PARTS_OF_A_HUNDRED // 100, 1), MOST_VALID)
    records = sorted(pictures.records, key=lambda record: hashlib.sha256(record[0].encode()).digest())
    return tuple(PreparedImages(pictures.pixels, sorted(some)) for some in (records[count:], records[:count]))


def prepare(folder):
    """The `PreparedImages` of a folder, decoded and degraded only if a name, size or time of its files has changed.

    Names each picture that cannot be used in one line on stderr. Raises ValueError if none can, OSError if there is
    no room for them.
    """
    files = list_images(folder)
    made_from = [FORMAT, [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]]
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    store = FOLDER / "prepared" / f"{folder.resolve().name}-{place}.pictures"
    opened = _open_store(store, made_from)
    if not opened:
        with _alone_in(store.parent):
            if not _open_store(store, made_from):  # another process may have made it meanwhile
                _write_store(store, made_from, files)
        opened = _open_store(store, made_from)
    pixels, index = opened
    for reason in index["left_out"]:
        print(f"left out: {reason}", file=sys.stderr)
    if not index["pictures"]:
        kinds = ", ".join(sorted(SUFFIXES))
        raise ValueError(
            f"{folder} has no usable pictures, of {len(files)}: put some of at least {HR_PATCH}x{HR_PATCH} there ({kinds}), "
            "or into train/ and valid/ below it"
        )
    return PreparedImages(pixels, index["pictures"])


def _open_store(store, made_from):
    """`(pixels, index)` of a prepared folder, or None if it was not prepared, or from other files."""
    try:
        pixels = np.asarray(np.memmap(store, np.uint8, "r"))
        index = json.loads(pixels[-8 - int.from_bytes(pixels[-8:].tobytes(), "little") : -8].tobytes())
    except (OSError, ValueError):
        return None
    return (pixels, index) if index["made_from"] == made_from else None


def _write_store(store, made_from, files):
    """Decode and degrade in parallel. A picture in memory for each thread is all it takes, however many there are."""
    size = 0
    for path in files:
        with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError), Image.open(path) as image:
            size += image.width * image.height * 3
    _check_room(store.parent, size * 17 // 16, f"{len(files)} prepared pictures")
    temporary = store.with_suffix(".tmp")
    writing = threading.Lock()

    def add(path):
        """The picture's record, or the reason why it is left out."""
        try:
            hr = read_rgb(path)
        except (OSError, ValueError) as error:
            return str(error)
        h, w = (side // SCALE for side in hr.shape[:2])
        if min(h, w) < LR_PATCH:
            return f"{path} is smaller than a patch of {HR_PATCH}x{HR_PATCH}: {hr.shape[1]}x{hr.shape[0]}"
        hr = np.ascontiguousarray(hr[: SCALE * h, : SCALE * w])
        lr = np.ascontiguousarray(degrade(hr))
        with writing:
            start = file.tell()
            file.write(hr)
            file.write(lr)
        return [path.name, h, w, start]

    try:
        with open(temporary, "wb") as file, ThreadPool(min(os.cpu_count(), 16)) as pool:
            results = list(tqdm(pool.imap_unordered(add, files), "preparing pictures", len(files), disable=None))
            index = {
                "made_from": made_from,
                "pictures": sorted(result for result in results if isinstance(result, list)),
                "left_out": sorted(result for result in results if isinstance(result, str)),
            }
            index = json.dumps(index).encode()
            file.write(index + len(index).to_bytes(8, "little"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, store)
    finally:
        temporary.unlink(missing_ok=True)


def patches(pictures, batch_size, first_step, last_step, seed, jpeg=None, part=0, parts=1):
    """The batches of the steps after `first_step` up to `last_step`, as a `tf.data.Dataset` of `(lr, hr)`.

    `lr` is `(batch, 24, 24, 3)` and `hr` `(batch, 96, 96, 3)`, uint8, 0 to 255, aligned. A batch depends on `seed`,
    `batch_size` and its step alone, so that a continued run has no state to restore. An epoch visits each picture
    once, in an order of its own, at a random place, flipped and turned in one of eight ways. `jpeg=(low, high)`
    compresses a half of the LR patches in these qualities. With several workers each takes its `part` of `parts` equal
    slices of every batch. Raises ValueError if the batch does not divide.
    """
    import tensorflow as tf

    if batch_size % parts or not 0 <= part < parts:
        raise ValueError(
            f"a batch must divide equally between the workers, got {batch_size} patches for {parts} (part {part})"
        )
    mine = range(batch_size // parts * part, batch_size // parts * (part + 1))

    @functools.lru_cache(2)  # a batch may end one epoch and begin the next
    def order(epoch):
        return np.random.default_rng([seed, 0, epoch]).permutation(len(pictures))

    def batch(step):
        """Drawn for the whole batch, so that a sample is the same however many workers share it."""
        numbers = np.arange(batch_size) + (step - 1) * batch_size
        chosen = np.array([order(epoch)[visit] for epoch, visit in zip(*divmod(numbers, len(pictures)))])
        rng = np.random.default_rng([seed, 1, step])
        tops, lefts = rng.integers(0, pictures.sizes[chosen].T - LR_PATCH, endpoint=True)
        turns = rng.integers(0, 8, batch_size)
        qualities = (
            rng.integers(0, 2, batch_size) * rng.integers(*jpeg, batch_size, endpoint=True) if jpeg else 0 * turns
        )
        lrs = np.empty((len(mine), LR_PATCH, LR_PATCH, 3), np.uint8)
        hrs = np.empty((len(mine), HR_PATCH, HR_PATCH, 3), np.uint8)
        for i, j in enumerate(mine):
            lr, hr = pictures[chosen[j]]
            top, left = tops[j], lefts[j]
            hr = hr[SCALE * top : SCALE * top + HR_PATCH, SCALE * left : SCALE * left + HR_PATCH]
            if qualities[j]:
                lr = _compressed(lr, top, left, int(qualities[j]))
            else:
                lr = lr[top : top + LR_PATCH, left : left + LR_PATCH]
            _turn(lr, turns[j], lrs[i])
            _turn(hr, turns[j], hrs[i])
        return lrs, hrs

    def shaped(step):
        lr, hr = tf.numpy_function(batch, [step], [tf.uint8, tf.uint8], stateful=False)
        return (
            tf.ensure_shape(lr, (len(mine), LR_PATCH, LR_PATCH, 3)),
            tf.ensure_shape(hr, (len(mine), HR_PATCH, HR_PATCH, 3)),
        )

    steps = tf.data.Dataset.range(first_step + 1, last_step + 1)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF  # `part` does it
    return steps.map(shaped, num_parallel_calls=2, deterministic=True).prefetch(4).with_options(options)


def _turn(patch, way, out):
    """Write the patch into `out` in one of the eight ways to flip and turn a square; `way` is 0 to 7."""
    patch, out = patch.view("V3")[..., 0], out.view("V3")[..., 0]  # NumPy moves a whole pixel faster than three bytes
    patch = patch[:: -1 if way & 1 else 1, :: -1 if way & 2 else 1]
    out[...] = patch.T if way & 4 else patch


def _compressed(lr, top, left, quality):
    """The LR patch at `top`, `left`, its JPEG blocks lying as if the whole picture had been saved, not aligned with the patch."""
    block = 16  # with the usual halved chroma
    above, before = top % block, left % block
    size = -(-(LR_PATCH + block) // block) * block
    with io.BytesIO() as file:
        Image.fromarray(lr[top - above :, left - before :][:size, :size]).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))[above : above + LR_PATCH, before : before + LR_PATCH]
