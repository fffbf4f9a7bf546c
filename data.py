"""Image files, the 4x degradation, DIV2K, and the patches that training reads (Ledig et al. 2017, section 3.2).

Images are uint8 arrays `(height, width, 3)`, RGB, 0 to 255, unless a docstring says otherwise.
"""

import contextlib
import dataclasses
import functools
import hashlib
import http.client
import io
import os
import shutil
import stat
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms
from tqdm import tqdm

SCALE = 4
LR_PATCH, HR_PATCH = 24, 96
FOLDER = Path(__file__).resolve().parent / "data"  # DIV2K and the prepared images

# -------------------------------------------------------------------------------------------------------- image files

# What can be written: Pillow's name of the format, and the longest side (libjpeg's is a little less than JPEG's own).
FORMATS = {".png": ("PNG", 2**31 - 1), ".webp": ("WEBP", 16_383), ".bmp": ("BMP", 2**31 - 1)}
FORMATS |= dict.fromkeys((".jpg", ".jpeg"), ("JPEG", 65_500)) | dict.fromkeys((".tif", ".tiff"), ("TIFF", 2**31 - 1))
SUFFIXES = {*FORMATS, ".gif"}  # what can be read
SAVE_OPTIONS = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}  # subsampling 0: chroma at 4:4:4

# EXIF that still holds for an upscaled image: description, camera, resolution, software, date, artist, copyright, and
# Windows's title, comment, author, keywords and subject. The rest describes the layout of the old file.
EXIF_TAGS = {270, 271, 272, 282, 283, 296, 305, 306, 315, 33432, *range(0x9C9B, 0x9CA0)}
ORIENTATIONS = {2: (0, -1), 3: (2, 1), 4: (2, -1), 5: (3, -1), 6: (3, 1), 7: (1, -1), 8: (1, 1)}  # np.rot90, mirror
EXIF_ORIENTATION, EXIF_CAMERA, EXIF_GPS = 0x0112, 0x8769, 0x8825
EXIF_WIDTH, EXIF_HEIGHT, EXIF_INTEROPERABILITY = 0xA002, 0xA003, 0xA005


@dataclasses.dataclass
class ImageData:
    """What is kept of an image between reading and writing."""

    pixels: np.ndarray  # (h, w, 3) RGB or (h, w, 1) grey, uint8 or uint16
    alpha: np.ndarray | None = None  # (h, w) of the same type, 0: transparent
    exif: Image.Exif | None = None
    icc: bytes | None = None


def list_images(folder: str | Path) -> list[Path]:
    """The images in `folder`, not below it, by name. Hidden files are left out, among them macOS's `._photo.jpg`."""
    paths = (path for path in Path(folder).glob("[!.]*") if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in paths if path.is_file())


@contextlib.contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image with Pillow, its pixels not decoded yet. Every error inside becomes a ValueError of one line."""
    Image.MAX_IMAGE_PIXELS = None  # large images are welcome
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("it is not a regular file")
        with Image.open(path, formats=[*{kind for kind, _ in FORMATS.values()}, "GIF"]) as image:
            yield image
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a PNG, JPEG, WebP, TIFF, BMP or GIF image") from error
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged files
        raise ValueError(f"can't read {path}: {reason(error)}") from error


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def read_image(path: str | Path) -> ImageData:
    """Read any image, upright; grey stays grey, 16-bit stays 16-bit. Raises ValueError, in one line, if it can't.

    Warns (`warnings.warn`) of what is not read: all frames but the first, and colour TIFF beyond 8 bits.
    """
    with open_image(path) as image:
        icc = image.info.get("icc_profile")
        if getattr(image, "n_frames", 1) > 1:
            warnings.warn(f"{path} has {image.n_frames} frames: only the first is read")
        image.load()
        exif = image.getexif()  # Pillow turns a TIFF upright by itself, and removes the orientation here
        if image.format == "PNG" and (png := Path(path).read_bytes())[24] == 16:  # Pillow reduces colour to 8 bits
            import tensorflow as tf

            keyed = "transparency" in image.info  # one colour is transparent
            pixels = tf.io.decode_png(png, 4 if keyed else 0, tf.uint16).numpy()
            pixels = pixels[..., [0, 3]] if keyed and image.mode == "I;16" else pixels
        else:
            tags = image.tag_v2 if image.format == "TIFF" else {}
            depth, black_is_zero = max(tags.get(258, (8,))), tags.get(262) == 1
            if image.mode in ("I", "F") or (image.mode[0] == "I" and not (depth == 16 and black_is_zero)):
                raise ValueError("this kind of grey pixels is not supported: save it as a PNG of 8 or 16 bits")
            if image.mode[0] != "I" and depth > 8:
                warnings.warn(f"{path} has {depth}-bit colour, of which 8 are read: convert it to PNG to keep 16")
            if image.mode == "CMYK" and icc:
                try:
                    srgb = ImageCms.createProfile("sRGB")
                    image = ImageCms.profileToProfile(image, io.BytesIO(icc), srgb, outputMode="RGB")
                except ImageCms.PyCMSError:
                    warnings.warn(f"{path}: its colour profile is damaged or not for CMYK, so it is ignored")
                icc = None
            if image.mode[0] != "I":
                kind = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
                image = image.convert(kind + "A" * image.has_transparency_data)
            pixels = np.asarray(image)

    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False).reshape(*pixels.shape[:2], -1)
    turns, step = ORIENTATIONS.get(exif.get(EXIF_ORIENTATION), (0, 1))
    pixels = np.rot90(pixels, turns)[:, ::step]
    colour, alpha = (pixels, None) if pixels.shape[2] in (1, 3) else (pixels[..., :-1], pixels[..., -1].copy())
    return ImageData(np.ascontiguousarray(colour), alpha, exif, icc)


def read_rgb(path: str | Path) -> np.ndarray:
    """Read any image as upright RGB, `(h, w, 3)` uint8, without its alpha. Raises ValueError, in one line."""
    pixels = read_image(path).pixels
    pixels = to_8_bit(pixels) if pixels.dtype == np.uint16 else pixels
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2)


def to_8_bit(values: np.ndarray) -> np.ndarray:
    return np.uint8((values.astype(np.uint32) + 128) // 257)


def spread_colours(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Give the fully transparent pixels of `(h, w, channels)` the mean colour of the visible ones nearby.

    Their own colour is arbitrary, often black, and would bleed into the edges of what is visible.
    """
    visible = (alpha > 0)[..., None]
    if visible.all() or not visible.any():
        return pixels
    height, width, _ = pixels.shape
    blocks = np.pad(np.dstack([pixels * visible, visible]), ((0, height % 2), (0, width % 2), (0, 0)))
    blocks = blocks.reshape(-(-height // 2), 2, -(-width // 2), 2, -1).sum((1, 3), np.float32)
    colours, counts = blocks[..., :-1] / np.maximum(blocks[..., -1:], 1), blocks[..., -1]
    colours = spread_colours(colours, counts).repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    return np.where(visible, pixels, colours).astype(pixels.dtype)


def check_output(path: str | Path, width: int, height: int):
    """Raise ValueError if an image of this size, upscaled, can't be written to a file of this name."""
    path, width, height = Path(path), SCALE * width, SCALE * height
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"can't write {path}: the name of an image ends in one of {' '.join(sorted(FORMATS))}")
    kind, longest = FORMATS[path.suffix.lower()]
    if max(width, height) > longest:
        raise ValueError(f"can't write {path}: {width}x{height} is more than the {longest:,} pixels a side of a {kind}")


def write_image(path: str | Path, image: ImageData):
    """Write an image in the format of the path's suffix, whole or not at all. Raises OSError, in one line.

    Warns where the format keeps less than the image has: alpha (it is put on white), 16 bits, long EXIF.
    """
    kind, _ = FORMATS[Path(path).suffix.lower()]
    pixels, alpha, icc = image.pixels, image.alpha, image.icc
    height, width, channels = pixels.shape
    # TensorFlow encodes fewer than 2**31 values, of four channels 536 megapixels.
    keeps_16_bits = {"PNG": height * width <= 500e6, "TIFF": channels == 1 and alpha is None}.get(kind, False)
    if pixels.dtype == np.uint16 and not keeps_16_bits:
        warnings.warn(f"{path} is written with 8 of the image's 16 bits: .png keeps them, up to 500 megapixels")
        pixels, alpha = to_8_bit(pixels), None if alpha is None else to_8_bit(alpha)
    # The profile of a colour image doesn't describe a grey one, nor the other way round; WebP has no grey.
    if icc and icc[16:20] != (b"GRAY" if channels == 1 and kind != "WEBP" else b"RGB "):
        icc = None
    metadata = {"icc_profile": icc}
    if image.exif:
        try:
            exif = Image.Exif()
            exif.update({tag: image.exif[tag] for tag in EXIF_TAGS.intersection(image.exif)})
            exif.get_ifd(EXIF_GPS).update(image.exif.get_ifd(EXIF_GPS))
            exif.get_ifd(EXIF_CAMERA).update(image.exif.get_ifd(EXIF_CAMERA))
            exif.get_ifd(EXIF_CAMERA).pop(EXIF_INTEROPERABILITY, None)  # a place in the old file
            exif.get_ifd(EXIF_CAMERA).update({EXIF_WIDTH: width, EXIF_HEIGHT: height})
            if len(exif.tobytes()) > 65_533:  # the most that a JPEG holds
                raise ValueError
            metadata["exif"] = exif.tobytes()
        except Exception:  # Pillow raises a dozen kinds on damaged EXIF
            warnings.warn(f"{path}: the EXIF of its original is damaged or too long, so it is left out")

    with atomic_write(path) as temporary:
        if pixels.dtype == np.uint16 and kind == "PNG":  # Pillow writes only 8 bits; it makes the metadata
            import tensorflow as tf

            png = tf.io.encode_png(pixels if alpha is None else np.dstack([pixels, alpha])).numpy()
            Image.new("L", (1, 1)).save(file := io.BytesIO(), "PNG", **metadata)
            small, header = file.getvalue(), 33  # bytes
            temporary.write_bytes(png[:header] + small[header : small.rindex(b"IDAT") - 4] + png[header:])
            return
        image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
        if alpha is not None and kind in ("JPEG", "BMP"):
            if alpha.min() < 255:
                warnings.warn(f"{path} can't hold transparency: the image is put on white")
            white = Image.new(image.mode, image.size, "white")
            image = Image.composite(image, white, Image.fromarray(alpha))
        elif alpha is not None:
            image.putalpha(Image.fromarray(alpha))
        image.save(temporary, kind, **metadata, **SAVE_OPTIONS.get(kind, {}))


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and move it to `path` at the end: written whole, or not at all.

    The new file takes the mode of the one that it replaces, which must be a regular file. Every error inside becomes an
    OSError, "can't write PATH: reason". Leftovers of killed processes in the folder are removed after an hour.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a regular file")
        for leftover in path.parent.glob(".srgan-????????.tmp"):
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                if time.time() - leftover.stat().st_mtime > 3600:
                    shutil.rmtree(leftover)
        # In a private folder nobody else can write to the temporary file, or put a link in its place.
        with tempfile.TemporaryDirectory(".tmp", ".srgan-", path.parent) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            if path.exists():
                temporary.chmod(stat.S_IMODE(path.stat().st_mode))
            os.replace(temporary, path)
    except Exception as error:
        raise OSError(f"can't write {path}: {reason(error)}") from error


# ----------------------------------------------------------------------------------------- degradation, scoring pairs


def degrade(hr: np.ndarray) -> np.ndarray:
    """The 4x bicubic degradation of the benchmarks: `(4h, 4w, 3)` to `(h, w, 3)`.

    Equals MATLAB's `imresize(hr, 1/4)`, except within 4 LR pixels of the edge. MATLAB rounds to uint8 between the
    vertical and the horizontal pass. Two calls of Pillow do the same, one call doesn't.
    """
    height, width = hr.shape[:2]
    if height % SCALE or width % SCALE:
        raise ValueError(f"an image to degrade needs sides that are multiples of {SCALE}, got {width}x{height}")
    image = Image.fromarray(hr).resize((width, height // SCALE), Image.Resampling.BICUBIC)
    return np.asarray(image.resize((width // SCALE, height // SCALE), Image.Resampling.BICUBIC))


def bicubic(lr: np.ndarray) -> np.ndarray:
    """The 4x bicubic interpolation: `(h, w, 3)` to `(4h, 4w, 3)`; also of alpha, `(h, w)` uint8 or uint16."""
    height, width = lr.shape[:2]
    return np.asarray(Image.fromarray(lr).resize((width * SCALE, height * SCALE), Image.Resampling.BICUBIC))


def scoring_pairs(folder: str | Path) -> list[tuple[str, Path, Path | None]]:
    """The images to score on, by name: a list of `(name, HR path, LR path or None)`.

    `folder` holds HR images, or `HR/` and perhaps `LR_x4/`, whose files have the same names or end in `x4`.
    Raises ValueError if there are none, or an LR is missing.
    """
    hr_folder, lr_folder = Path(folder) / "HR", Path(folder) / "LR_x4"
    if not hr_folder.is_dir():
        hr_folder, lr_folder = Path(folder), None
    hr_paths = list_images(hr_folder)
    if not hr_paths:
        raise ValueError(f"no images in {hr_folder}")
    if not (lr_folder and lr_folder.is_dir()):
        return [(path.stem, path, None) for path in hr_paths]
    names = {path.stem: path for path in list_images(lr_folder)}
    lr_paths = [names.get(path.stem) or names.get(path.stem + "x4") for path in hr_paths]
    if None in lr_paths:
        raise ValueError(f"{hr_paths[lr_paths.index(None)]} has no LR image of that name in {lr_folder}")
    return [(hr_path.stem, hr_path, lr_path) for hr_path, lr_path in zip(hr_paths, lr_paths)]


def read_pair(hr_path: str | Path, lr_path: str | Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Read LR `(h, w, 3)` and HR `(4h, 4w, 3)` to score on. LR is made from HR if `lr_path` is None.

    HR loses the rows and columns beyond a multiple of 4. Raises ValueError if the sizes don't go together.
    """
    hr = crop_to_scale(read_rgb(hr_path))
    if min(hr.shape[:2]) < 2 * 4 + 11:  # the border that scores leave out, and the window of SSIM
        raise ValueError(f"{hr_path} is too small to score")
    lr = degrade(hr) if lr_path is None else read_rgb(lr_path)
    (h, w), (height, width) = lr.shape[:2], hr.shape[:2]
    if (SCALE * h, SCALE * w) != (height, width):
        raise ValueError(f"{lr_path} is {w}x{h}, and a quarter of {hr_path} is {width // SCALE}x{height // SCALE}")
    return lr, hr


def crop_to_scale(hr):
    """Without the rows and columns beyond a multiple of 4."""
    return np.ascontiguousarray(hr[: hr.shape[0] // SCALE * SCALE, : hr.shape[1] // SCALE * SCALE])


# ------------------------------------------------------------------------------------------------------------- DIV2K

# The HR archives, their bytes and sha256. The LR are made by `degrade`.
DIV2K_URL = "https://data.vision.ee.ethz.ch/cvl/DIV2K/"
DIV2K = {
    "DIV2K_train_HR": (3530603713, "9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335"),
    "DIV2K_valid_HR": (448993893, "20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc"),
}
WAITS = (1, 4, 15, 60)  # seconds before each retry, counted anew when more has arrived
TIMEOUT = 30  # seconds without a byte until a connection counts as broken


def download_div2k() -> Path:
    """The folder with DIV2K's HR images, downloaded on first use, or continued. Raises OSError or ValueError."""
    root = FOLDER / "DIV2K"
    with lock(root):
        for name, (size, sha256) in DIV2K.items():
            folder, archive, part = root / name, root / f"{name}.zip", root / f"{name}.zip.part"
            if not folder.is_dir():
                # The extracted images are as large as the archive, the prepared ones twice as large.
                there = part.stat().st_size if part.exists() else 0
                check_room(root, 3 * size - there, f"{name} and its prepared images")
                if not archive.exists():  # the user may have put it there
                    archive = download(f"{DIV2K_URL}{name}.zip", part, size)
                with open(archive, "rb") as file:
                    damaged = hashlib.file_digest(file, "sha256").hexdigest() != sha256
                if damaged:
                    part.unlink(missing_ok=True)
                    raise ValueError(f"{archive} is damaged or not the published archive: its sha256 is not {sha256}")
                print(f"extracting {archive}", flush=True)
                shutil.unpack_archive(archive, root / "unpacking", "zip")
                (root / "unpacking" / name).rename(folder)  # so a folder that exists is whole
            part.unlink(missing_ok=True)
            shutil.rmtree(root / "unpacking", ignore_errors=True)
    return root


def download(url, part, size):
    """Download to `part`, continuing what is there. Retries are counted anew whenever more arrives. Returns `part`."""
    tries, most = 0, 0
    while (here := part.stat().st_size if part.exists() else 0) < size:
        tries, most = (0 if here > most else tries), max(here, most)
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={here}-"} if here else {})
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                if not answer.headers.get("Content-Range", "").startswith(f"bytes {here}-"):
                    here = 0  # the server sends all of it
                if here + int(answer.headers.get("Content-Length", 0)) != size:
                    raise OSError(f"the server doesn't offer the published {size} bytes")
                bar = tqdm(desc=part.stem, initial=here, total=size, unit="B", unit_scale=True, disable=None)
                with open(part, "ab" if here else "wb") as file, bar:
                    while data := answer.read1(1 << 20):
                        bar.update(file.write(data))
            if part.stat().st_size < size:
                raise OSError("the connection ended early")
        except (OSError, http.client.HTTPException) as error:
            if tries == len(WAITS) or getattr(error, "code", None) in (401, 403, 404, 410):  # retrying won't help
                hint = f"run the same command again to continue, put the file into {part.parent}, or use --data_dir"
                raise OSError(f"can't download {url} ({error}): {hint}") from error
            print(f"{url}: {error}; trying again in {WAITS[tries]} s", file=sys.stderr)
            time.sleep(WAITS[tries])
            tries += 1
    return part


@contextlib.contextmanager
def lock(folder: str | Path, wait: bool = True):
    """Make the folder and lock it. Raises OSError if `wait` is False and another process holds the lock.

    One worker downloads or prepares while the others wait; a run folder is used by one training at a time.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with open(Path(folder) / ".lock", "a") as file:
            with contextlib.suppress(ImportError):  # not on Windows
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield
    except BlockingIOError as error:
        raise OSError(f"another process is using {folder}: wait until it ends, or choose another folder") from error


def check_room(folder, needed, what):
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{what} need {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free")


# ---------------------------------------------------------------------------------------------------- prepared images

# Decoding a 2K image for every patch would starve the training. So each image becomes one .npy file, mapped into
# memory: uint8 `(17, h, w, 3)`, LR and then HR, 16 times as large. Its name is a digest of what it was made from.
DEGRADATION = 1  # version


class PreparedImages:
    """Prepared images, mapped into memory: `images[i]` is LR `(h, w, 3)` and HR `(4h, 4w, 3)`, read-only.

    `names` are the file names, `sizes` `(len, 2)` LR's heights and widths, and `fingerprint` is a digest of the files'
    names, sizes and times.
    """

    def __init__(self, paths: dict[str, Path]):
        self.names, self.paths = list(paths), list(paths.values())
        self.fingerprint = digest([path.name for path in self.paths])
        self.sizes = np.array([lr.shape[:2] for lr, _ in self])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return keep_open(self.paths[i])


def open_prepared(path):
    array = np.load(path, mmap_mode="r").view(np.ndarray)
    _, h, w, _ = array.shape
    return array[0].view(np.uint8), array[1:].view(np.uint8).reshape(SCALE * h, SCALE * w, 3)


# A mapped file takes a file descriptor, of which other code needs some, too, and one of Linux's 65,530 maps.
DESCRIPTORS = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else 2048
keep_open = functools.lru_cache(min(max(DESCRIPTORS - 256, 64), 32_000))(open_prepared)


def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:32]


def load(data_dir: str | Path | None = None) -> tuple[PreparedImages, PreparedImages]:
    """The images to train on and to validate with, prepared on first use. Raises OSError or ValueError.

    `data_dir` is a folder with `train/` and `valid/`, or `DIV2K_train_HR/` and `DIV2K_valid_HR/`, or just images, of
    which a few, always the same, are kept for validation. None: DIV2K, downloaded on first use.
    """
    folder = Path(data_dir) if data_dir else download_div2k()
    for train, valid in (("DIV2K_train_HR", "DIV2K_valid_HR"), ("train", "valid"), (".", "")):
        if (folder / train).is_dir():
            break
    images = prepare(folder / train)
    if valid and (folder / valid).is_dir():
        return images, prepare(folder / valid)
    if len(images) < 2:
        raise ValueError(f"{folder} needs at least 2 usable images, one of them for validation, but has {len(images)}")
    # A hash of the name decides which 3 %, 1 to 10, are for validation: adding an image moves at most one other.
    pairs = sorted(zip(images.names, images.paths), key=lambda pair: hashlib.sha256(os.fsencode(pair[0])).digest())
    count = min(max(len(images) * 3 // 100, 1), 10)
    return PreparedImages(dict(sorted(pairs[count:]))), PreparedImages(dict(sorted(pairs[:count])))


def prepare(folder: str | Path) -> PreparedImages:
    """Decode and degrade the images of a folder, except those that are prepared already.

    Prints a line on stderr for each unusable image. Raises ValueError if none is usable, OSError if they can't be
    stored.
    """
    place = str(Path(folder).resolve())
    store = FOLDER / "prepared" / f"{Path(place).name}-{digest(place)[:8]}"
    targets, missing, room = {}, [], 0
    for path in list_images(folder):
        version = DEGRADATION, path.name, path.stat().st_size, path.stat().st_mtime_ns
        targets[path] = store / f"{digest(version)}.npy"
    with lock(store.parent):
        store.mkdir(0o700, exist_ok=True)
        for stale in set(store.iterdir()).difference(targets.values()):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        for path, target in targets.items():
            try:
                open_prepared(target)
            except (OSError, ValueError, EOFError):  # missing or damaged
                target.unlink(missing_ok=True)
                missing.append(path)
                with contextlib.suppress(ValueError), open_image(path) as image:
                    room += image.width * image.height * 3 * 17 // 16
        check_room(store, room, f"{len(missing)} prepared images")
        with ThreadPool(min(os.cpu_count(), 16)) as pool:
            lines = pool.imap_unordered(lambda path: prepare_image(path, targets[path]), missing)
            lines = sorted(filter(None, tqdm(lines, "preparing images", len(missing), disable=None)))
    for line in lines:
        print(f"left out: {line}", file=sys.stderr)
    prepared = {path.name: target for path, target in targets.items() if target.exists()}
    if not prepared:
        raise ValueError(f"{folder} has no usable images (of {len(targets)}): each needs {HR_PATCH}x{HR_PATCH} pixels")
    return PreparedImages(prepared)


def prepare_image(path, target):
    """Store an image and its LR. Returns None, or why it can't be used."""
    try:
        hr = read_rgb(path)
    except ValueError as error:
        return str(error)
    if min(hr.shape[:2]) < HR_PATCH:
        return f"{path} is smaller than a patch of {HR_PATCH}x{HR_PATCH}: {hr.shape[1]}x{hr.shape[0]}"
    hr = crop_to_scale(hr)
    lr = degrade(hr)
    with atomic_write(target) as temporary:
        np.save(temporary, np.concatenate([lr[None], hr.reshape(-1, *lr.shape)]))
        temporary.chmod(0o600)


# ------------------------------------------------------------------------------------------------------------ patches

VISIT_PIXELS = 400 * 400  # an epoch visits an image once per this many HR pixels


def patches(images: PreparedImages, batch_size: int, first_step: int, last_step: int, seed: int, jpeg=None):
    """The batches of the steps after `first_step` up to `last_step`: LR `(n, 24, 24, 3)` and HR `(n, 96, 96, 3)`.

    They depend on `seed`, `batch_size` and the step alone, so a continued run has no state to restore. An epoch visits
    the images in random order, large ones more than once, each time at a random place, flipped and turned.

    Args:
        jpeg: qualities to compress half of the LR patches with, as "70-95". None: no compression.

    Returns:
        A `tf.data.Dataset` of pairs, uint8.
    """
    import tensorflow as tf

    low, high = map(int, jpeg.split("-")) if jpeg else (0, 0)
    counts = np.maximum(images.sizes.prod(axis=1) * SCALE**2 // VISIT_PIXELS, 1)
    visits = np.repeat(np.arange(len(images)), counts)

    @functools.lru_cache(2)  # a batch may end one epoch and begin the next
    def order(epoch):
        return np.random.default_rng([seed, 0, epoch]).permutation(visits)

    def batch(step):
        numbers = np.arange(batch_size) + (step - 1) * batch_size
        chosen = np.array([order(epoch)[visit] for epoch, visit in zip(*divmod(numbers, len(visits)))])
        rng = np.random.default_rng([seed, 1, step])
        tops, lefts = rng.integers(0, images.sizes[chosen].T - LR_PATCH, endpoint=True)
        ways = rng.integers(0, 8, batch_size)
        qualities = rng.integers(0, 2, batch_size) * rng.integers(low, high, batch_size, endpoint=True)
        samples = np.stack([chosen, tops, lefts, ways, qualities], axis=1).tolist()
        lrs = np.empty((batch_size, LR_PATCH, LR_PATCH, 3), np.uint8)
        hrs = np.empty((batch_size, HR_PATCH, HR_PATCH, 3), np.uint8)
        for lr_out, hr_out, (i, top, left, way, quality) in zip(lrs, hrs, samples):
            lr, hr = images[i]
            y, x = slice(top, top + LR_PATCH), slice(left, left + LR_PATCH)
            turn(jpeg_patch(lr, y, x, quality) if quality else lr[y, x], way, lr_out)
            top, left = SCALE * top, SCALE * left
            turn(hr[top : top + HR_PATCH, left : left + HR_PATCH], way, hr_out)
        return lrs, hrs

    def with_shapes(step):
        lr, hr = tf.numpy_function(batch, [step], [tf.uint8, tf.uint8], stateful=False)
        return tf.reshape(lr, (batch_size, LR_PATCH, LR_PATCH, 3)), tf.reshape(hr, (batch_size, HR_PATCH, HR_PATCH, 3))

    steps = tf.data.Dataset.range(first_step + 1, last_step + 1)
    return steps.map(with_shapes, num_parallel_calls=2, deterministic=True).prefetch(4)


def turn(patch, way, out):
    """Write the patch into `out` in one of the eight ways to flip and turn a square; `way` is 0 to 7."""
    patch, out = patch.view("V3")[..., 0], out.view("V3")[..., 0]  # NumPy moves a whole pixel faster than three bytes
    patch = patch[:: -1 if way & 1 else 1, :: -1 if way & 2 else 1]
    out[...] = patch.T if way & 4 else patch


def jpeg_patch(lr, y, x, quality):
    """`lr[y, x]` as if the whole image had been saved as JPEG, whose 16x16 blocks are not aligned with the patch."""
    above, left = y.start % 16, x.start % 16
    around = lr[y.start - above :, x.start - left :][:48, :48]
    Image.fromarray(around).save(file := io.BytesIO(), "JPEG", quality=quality)
    return np.asarray(Image.open(file))[above : above + LR_PATCH, left : left + LR_PATCH]
