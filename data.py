"""Image files, the 4x degradation, DIV2K, and the patches that training reads (Ledig et al. 2017, section 3.2).

Images are uint8 arrays `(height, width, 3)`, RGB, 0 to 255, unless a docstring says otherwise.
"""

import contextlib
import functools
import hashlib
import http.client
import io
import os
import shutil
import sys
import tempfile
import urllib.request
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin, features
from tqdm import tqdm

SCALE, LR_PATCH, HR_PATCH = 4, 24, 96
VISIT_PIXELS = 400 * 400  # an epoch of training visits an image once per this many HR pixels
# What can be read and written, and Pillow's name of the format.
SUFFIXES = {".png": "PNG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"}
SUFFIXES |= dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG")
SUFFIXES |= {".avif": "AVIF"} if "avif" in features.modules and features.check("avif") else {}  # since Pillow 11.3
LONGEST_SIDE = {"JPEG": 65_500, "WEBP": 16_383, "AVIF": 32_768}  # libjpeg's is a little less than JPEG's own
# EXIF that still holds when upscaled: description, camera, resolution, software, date, artist, copyright, exposure, GPS
EXIF_TAGS = {270, 271, 272, 282, 283, 296, 305, 306, 315, 33432, EXIF_DETAILS := 0x8769, 0x8825}
ORIENTATIONS = {2: (0, -1), 3: (2, 1), 4: (2, -1), 5: (3, -1), 6: (3, 1), 7: (1, -1), 8: (1, 1)}  # np.rot90, mirror
PLAINLY = {  # what Pillow says of files that are valid, and what a user should read
    "MAX_TEXT": "its texts and colour profile are over 64 MB",
    "unknown pixel mode": "its pixels are of a rare kind, such as 12 bits or float: save it as a PNG of 8 or 16 bits",
}
# DIV2K's HR archives, their bytes and sha256. The LR are made by `degrade`.
DIV2K_URL = "https://data.vision.ee.ethz.ch/cvl/DIV2K/"
DIV2K = {
    "DIV2K_train_HR": (3530603713, "9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335"),
    "DIV2K_valid_HR": (448993893, "20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc"),
}
# Decoding a 2K image for every patch would starve the training. So each image becomes one .npy file, mapped into
# memory: uint8 `(17, h, w, 3)`, LR and then HR, 16 times as large. Its name is a digest of what it was made from.
# Each takes a file descriptor, of which other code needs some, too, and one of Linux's 65,530 maps.
DESCRIPTORS = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else 2048


class UserError(OSError):
    """What the user can mend, beside faults of files: printed, as any OSError, as one line without a traceback."""


def list_images(folder: str | Path, *others: Path) -> list[Path]:
    """The images in `folder`, by name. Prints how many files are left out, except `others`. Raises UserError."""
    paths = sorted(path for path in Path(folder).iterdir() if path.name[0] != "." and path not in others)
    images = [path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not images:
        deeper = (path.parent for path in Path(folder).rglob("[!.]*") if path.suffix.lower() in SUFFIXES)
        hint = next((f"there are some in {path}" for path in deeper), f"supported are {' '.join(sorted(SUFFIXES))}")
        raise UserError(f"no images in {folder}: {hint}")
    if left_out := len(paths) - len(images):
        print(f"{folder}: left out {left_out} of {len(paths)} files and subfolders: no images", file=sys.stderr)
    return images


@contextlib.contextmanager
def open_image(path: str | Path):
    """Yield a file's content, and Pillow's image of it, not decoded yet. Errors inside become OSErrors of one line."""
    Image.MAX_IMAGE_PIXELS = None  # large images are welcome
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20  # so are long texts and colour profiles
    TiffImagePlugin.READ_LIBTIFF = True  # Pillow's own reader takes planes of 16 bits for planes of 8
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError("it is not a regular file")
        content = Path(path).read_bytes()
        try:
            yield content, Image.open(io.BytesIO(content), formats=sorted(set(SUFFIXES.values())))
        except Image.UnidentifiedImageError:
            if kind := SUFFIXES.get(Path(path).suffix.lower()):
                Image.OPEN[kind][0](io.BytesIO(content))  # raises why: "12-bit"
            raise OSError(f"not one of {' '.join(sorted(set(SUFFIXES.values())))}") from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged files
        why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        why = next((plain for words, plain in PLAINLY.items() if words in why), why)
        raise OSError(f"can't read {path}: {why}") from error


def read_image(path: str | Path) -> tuple[np.ndarray, np.ndarray | None, dict]:
    """Read an image, the first of several, upright: pixels, alpha or None, and metadata. Raises OSError, in one line.

    Pixels are `(h, w, 3)` RGB or `(h, w, 1)` grey, uint8 or, except from colour TIFF, uint16; alpha is `(h, w)`.
    """
    with open_image(path) as (content, image):
        image.load()
        exif = image.getexif()  # Pillow turns a TIFF upright by itself, and removes the orientation here
        icc, dpi = image.info.get("icc_profile"), image.info.get("dpi")
        metadata = {"lossless": image.format == "WEBP" and b"VP8L" in content}
        if image.format == "PNG" and content[24] == 16:  # Pillow reduces colour to 8 bits
            import tensorflow as tf

            pixels = tf.io.decode_png(content, 4 * ("transparency" in image.info), tf.uint16).numpy()
        else:
            tags, deep = image.tag_v2 if image.format == "TIFF" else {}, image.mode.startswith("I;16")
            depth, black_is_zero = max(tags.get(258, (8,))), tags.get(262) == 1
            if image.mode in ("I", "F") or (deep and not (depth == 16 and black_is_zero)):
                raise OSError("unknown pixel mode")
            if depth > 8 and not deep:
                warnings.warn(f"{path} has {depth}-bit colour, of which 8 are read: convert it to PNG to keep 16")
            if image.mode == "CMYK" and icc:
                with contextlib.suppress(ImageCms.PyCMSError):  # the profile is damaged, or not for CMYK
                    srgb = ImageCms.createProfile("sRGB")
                    image = ImageCms.profileToProfile(image, io.BytesIO(icc), srgb, outputMode="RGB")
            kind = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
            image = image if deep else image.convert(kind + "A" * image.has_transparency_data)
            pixels = np.asarray(image, np.uint16 if deep else np.uint8)
    turns, step = ORIENTATIONS.get(exif.get(0x0112), (0, 1))
    pixels = np.atleast_3d(np.rot90(pixels, turns)[:, ::step])
    colours = 1 if pixels.shape[2] < 3 else 3
    if icc and icc[16:20] == (b"GRAY" if colours == 1 else b"RGB "):  # that of CMYK has been used
        metadata["icc_profile"] = icc
    if dpi and all(1 <= number < 2**16 for number in dpi):
        metadata["dpi"] = tuple(map(float, dpi))
    with contextlib.suppress(Exception):  # damaged EXIF
        exif.bigtiff = False  # whose form is for its own files only
        for tag in (0xA002, 0xA003, 0xA005):  # width, height, interoperability
            exif.get_ifd(EXIF_DETAILS).pop(tag, None)
        for tag in exif.keys() - EXIF_TAGS:
            del exif[tag]
        if exif and len(exif.tobytes()) <= 65_533:  # the most that a JPEG holds
            metadata["exif"] = exif.tobytes()
    alpha = pixels[..., -1].copy() if pixels.shape[2] > colours else None
    return np.ascontiguousarray(pixels[..., :colours]), alpha, metadata


def read_rgb(path: str | Path) -> np.ndarray:
    """Read any image as upright RGB, `(h, w, 3)` uint8, without its alpha. Raises OSError, in one line."""
    pixels = to_8_bit(read_image(path)[0])
    return np.repeat(pixels, 3 // pixels.shape[2], axis=2)


def to_8_bit(values):
    return np.uint8((values.astype(np.uint32) + 128) // 257) if values.dtype == np.uint16 else values


def spread_colours(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Give transparent pixels of `(h, w, channels)` the colour of visible ones nearby, since their own would bleed."""
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
    """Raise UserError if an image of this size, upscaled, can't be written to a file of this name."""
    width, height, kind = SCALE * width, SCALE * height, SUFFIXES.get(Path(path).suffix.lower())
    if kind is None:
        raise UserError(f"can't write {path}: the name of an image ends in one of {' '.join(sorted(SUFFIXES))}")
    too_many = kind in ("TIFF", "BMP") and 4 * width * height > 2**32 - 2**20  # bytes
    if too_many or max(width, height) > LONGEST_SIDE.get(kind, 2**31 - 1):
        raise UserError(f"can't write {path}: {width}x{height} is more than a {kind} holds, choose .png")


def find_jobs(source: str, output: str) -> list[tuple[Path, Path]]:
    """The images to read, each with the file to write, whose folder it makes. Raises OSError if that isn't possible."""
    source, target = Path(source), Path(output)
    if not source.is_dir():
        jobs = [(source, target / source.name if output.endswith("/") or target.is_dir() else target)]
        with open_image(source) as (_, image):
            check_output(jobs[0][1], *image.size)
    elif target.suffix.lower() in SUFFIXES or target.is_file():
        raise UserError(f"--input {source} is a folder: --output must be a folder, too, not {target}")
    else:
        jobs = [(image, target / image.name) for image in list_images(source)]
    originals = {os.path.realpath(image) for image, _ in jobs}
    if both := [target for _, target in jobs if os.path.realpath(target) in originals]:
        raise UserError(f"--output {both[0]} is also an input, and inputs are never overwritten")
    folder = jobs[0][1].parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"can't write {jobs[0][1]}: {folder} is read-only")
    return jobs


def write_image(path: str | Path, pixels: np.ndarray, alpha: np.ndarray | None = None, metadata: dict = {}):
    """Write an image in the format of the path's suffix. Warns if that has no alpha, so white behind it, or 16 bits."""
    kind, (height, width, channels) = SUFFIXES[Path(path).suffix.lower()], pixels.shape
    keeps_16_bits = {"PNG": height * width <= 500e6, "TIFF": channels == 1 and alpha is None}.get(kind)  # TF's limit
    if pixels.dtype == np.uint16 and not keeps_16_bits:
        warnings.warn(f"{path} is written with 8 of the image's 16 bits: .png keeps them, up to 500 megapixels")
        pixels, alpha = to_8_bit(pixels), None if alpha is None else to_8_bit(alpha)
    grey_as_rgb = {"icc_profile": None} if kind == "WEBP" and channels == 1 else {}
    with atomic_write(path) as temporary:
        if pixels.dtype == np.uint16 and kind == "PNG":  # Pillow writes only 8 bits
            import tensorflow as tf

            pixels = pixels if alpha is None else np.dstack([pixels, alpha])
            temporary.write_bytes(tf.io.encode_png(pixels).numpy())
            return
        made = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
        if alpha is not None and kind not in ("JPEG", "BMP"):
            made.putalpha(Image.fromarray(alpha))
        elif alpha is not None and alpha.min() < 255:
            warnings.warn(f"{path} can't hold transparency: the image is put on white")
            made = Image.composite(made, Image.new(made.mode, made.size, "white"), Image.fromarray(alpha))
        made.save(temporary, kind, quality=95, subsampling="4:4:4", **metadata | grey_as_rgb)


@contextlib.contextmanager
def atomic_write(path: str | Path):
    """Yield a temporary path, moved to `path` at the end: written whole, or not at all. OSErrors inside name `path`."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # In a private folder nobody else can write to the temporary file, or put a link in its place.
        with tempfile.TemporaryDirectory(".tmp", ".srgan-", Path(path).parent) as folder:
            temporary = Path(folder) / Path(path).name
            yield temporary
            if temporary.is_file():
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"can't write {path}: {error.strerror or error}") from error


def degrade(hr: np.ndarray) -> np.ndarray:
    """The 4x degradation: `(4h, 4w, 3)` to `(h, w, 3)`, MATLAB's `imresize(hr, 1/4)` beyond 4 LR pixels from edges."""
    height, width = hr.shape[0] // SCALE, hr.shape[1] // SCALE
    image = Image.fromarray(hr).crop((0, 0, SCALE * width, SCALE * height))
    image = image.resize((SCALE * width, height), Image.Resampling.BICUBIC)  # MATLAB, too, rounds between the passes
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def bicubic(image: np.ndarray) -> np.ndarray:
    """The 4x bicubic interpolation: `(h, w, 3)` to `(4h, 4w, 3)`; also of alpha, `(h, w)` uint8 or uint16."""
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(image).resize((width * SCALE, height * SCALE), Image.Resampling.BICUBIC))


def scoring_pairs(folder: str | Path) -> list[tuple[str, Path, Path | None]]:
    """The images to score on: `(name, HR path, LR path or None)`. Raises UserError if only some have an LR.

    `folder` holds the HR, or `HR/`, and perhaps the LR, beside them or in `LR_x4/`, `LR/` or `LR_bicubic/X4/`; DIV2K's
    folders have its name before that. The LR of X.png or X_HR.png is X.png, Xx4.png, X_x4.png or X_LR.png.
    """
    prefix = max((path.name.removesuffix("HR") for path in Path(folder).glob("DIV2K_*_HR")), default="")
    hr_folder, *lr_folders = (Path(folder) / f"{prefix}{x}" for x in "HR LR_x4 LR LR_bicubic/X4 LR_bicubic".split())
    hr_paths = list_images(hr_folder if hr_folder.is_dir() else folder, *lr_folders)
    lr_folder = next(filter(Path.is_dir, lr_folders), None)
    lr_paths = {path.stem: path for path in (list_images(lr_folder) if lr_folder else hr_paths)}
    pairs = {}
    for path in hr_paths:
        base = path.stem.removesuffix("_HR")
        names = [base + ending for ending in ("x4", "_x4", "_LR", "") if lr_folder or base + ending != path.stem]
        pairs[path] = next((lr_paths[name] for name in names if name in lr_paths), None)
    used = set(pairs.values())
    pairs = [(path.stem, path, lr) for path, lr in pairs.items() if path not in used]
    alone = [path for _, path, lr in pairs if lr is None]
    alone += [path for path in lr_paths.values() if lr_folder and path not in used]
    if alone and (lr_folder or len(alone) < len(pairs) or any(path.stem.endswith("_LR") for path in alone)):
        raise UserError(f"{alone[-1]} has no partner: HR and LR images go by name, and all have one, or none has")
    return pairs


def read_pair(hr_path: str | Path, lr_path: str | Path | None) -> tuple[np.ndarray, np.ndarray]:
    """LR `(h, w, 3)`, made from HR if it has no file, and HR `(4h, 4w, 3)`, or `(4h, 4w, 1)` if its file is grey."""
    hr = to_8_bit(read_image(hr_path)[0])
    lr = read_rgb(lr_path) if lr_path else degrade(np.repeat(hr, 3 // hr.shape[2], axis=2))
    (h, w), (height, width) = lr.shape[:2], hr.shape[:2]
    if min(height, width) < 2 * 4 + 11:  # the border that scores leave out, and the window of SSIM
        raise UserError(f"{hr_path} is too small to score: {width}x{height}")
    if (h, w) != (height // SCALE, width // SCALE):
        raise UserError(f"{lr_path} is {w}x{h}, and a quarter of {hr_path} is {width // SCALE}x{height // SCALE}")
    return lr, hr[: SCALE * h, : SCALE * w]


def div2k(root: Path) -> Path:
    """The folder with DIV2K's HR images, downloaded on first use, or continued. Raises OSError."""
    with lock(root):
        for name, (size, sha256) in DIV2K.items():
            if (root / name).is_dir():
                continue
            archive, part = root / f"{name}.zip", root / f"{name}.zip.part"
            if not archive.exists():  # the user may have put it there
                download(f"{DIV2K_URL}{name}.zip", part, size)
                archive = part
            with open(archive, "rb") as file:
                damaged = hashlib.file_digest(file, "sha256").hexdigest() != sha256
            if damaged:
                part.unlink(missing_ok=True)
                raise OSError(f"{archive} is not the published archive: remove it, and run the same command again")
            print(f"extracting {archive}", flush=True)
            shutil.unpack_archive(archive, root / "unpacking", "zip")
            (root / "unpacking" / name).rename(root / name)  # so a folder that exists is whole
            part.unlink(missing_ok=True)
    return root


def download(url, path, size):  # or what is missing of it
    here = path.stat().st_size if path.exists() else 0
    if here < size:
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={here}-"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                here *= answer.status == 206  # otherwise the server sends all of it
                bar = {"desc": path.name, "initial": here, "total": size, "disable": None}
                with open(path, "ab" if here else "wb") as file, tqdm.wrapattr(file, "write", **bar) as out:
                    shutil.copyfileobj(answer, out)
            if path.stat().st_size < size:
                raise OSError("the connection ended early")
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"can't download {url} ({error}): run the command again, or use --data_dir") from error


@contextlib.contextmanager
def lock(folder: str | Path, wait: bool = True):
    """Make the folder and lock it, or raise UserError if another process has and `wait` is False."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".lock", "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(f"another process uses {folder}: wait until it ends, or choose another folder") from error
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks
        yield


class PreparedImages:
    """Images mapped into memory: `images[i]` is LR `(h, w, 3)` and HR `(4h, 4w, 3)`, `sizes[i]` LR's h and w."""

    def __init__(self, prepared: dict[Path, Path]):  # by the original
        self.names, self.paths = [path.name for path in prepared], list(prepared.values())
        self.sizes = np.array([lr.shape[:2] for lr, _ in self])
        self.fingerprint = digest([lr[len(lr) // 2].tobytes() for lr, _ in self])  # the same when moved

    def __len__(self):
        return len(self.paths)

    @functools.lru_cache(min(max(DESCRIPTORS - 256, 64), 32_000))
    def __getitem__(self, i):
        array = np.load(self.paths[i], mmap_mode="r").view(np.ndarray)
        return array[0], array[1:].reshape(SCALE * array.shape[1], -1, 3)


def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:32]


def load(data_dir: str | Path | None = None, cache_dir: str | Path | None = None):
    """The images to train on and to validate with, two PreparedImages. Raises OSError.

    `data_dir` holds `train/` and `valid/` (`val/`, `validation/`), or DIV2K's folders, or just images, a few of which,
    always the same, validate. None: DIV2K, downloaded on first use. It and the prepared images lie in `cache_dir`, or
    else in `data/` beside the program, or, where that can't be written, in the user's cache folder.
    """
    cache = Path(cache_dir or Path(__file__).resolve().parent / "data")
    if not (cache_dir or os.access(cache if cache.exists() else cache.parent, os.W_OK)):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "srgan"
    folder = Path(data_dir) if data_dir else div2k(cache / "DIV2K")
    trains = [folder / name for name in ("DIV2K_train_HR", "train") if (folder / name).is_dir()]
    valids = [folder / name for name in ("DIV2K_valid_HR", "valid", "val", "validation") if (folder / name).is_dir()]
    images = prepare(trains[0] if trains else folder, cache, *valids)
    if valids:
        return PreparedImages(images), PreparedImages(prepare(valids[0], cache))
    if len(images) < 2:
        raise UserError(f"{folder} needs at least 2 usable images, one of them for validation, but has {len(images)}")
    # A hash of the name decides which 3 % (1 to 10 images) validate, so adding an image moves at most one other.
    paths = sorted(images, key=lambda path: hashlib.sha256(os.fsencode(path.name)).digest())
    count = min(max(len(paths) * 3 // 100, 1), 10)
    return tuple(PreparedImages({path: images[path] for path in sorted(p)}) for p in (paths[count:], paths[:count]))


def prepare(folder: Path, cache: Path, *others: Path) -> dict[Path, Path]:
    """Decode and degrade images, except those prepared already. Returns the files of the usable ones, by original."""
    store = cache / "prepared" / f"{folder.resolve().name}-{digest(str(folder.resolve()))[:8]}"
    stats = {path: path.stat() for path in list_images(folder, *others)}
    targets = {p: store / f"{digest((1, p.name, s.st_size, s.st_mtime_ns))}.npy" for p, s in stats.items()}

    def is_prepared(path):
        with contextlib.suppress(OSError, ValueError, EOFError):  # missing or damaged
            return np.load(targets[path], mmap_mode="r") is not None

    def prepare_image(path):  # returns why the image can't be used, or None
        try:
            hr = read_rgb(path)
        except OSError as error:
            return str(error)
        if min(hr.shape[:2]) < HR_PATCH:
            return f"{path} is smaller than a patch of {HR_PATCH}x{HR_PATCH}: {hr.shape[1]}x{hr.shape[0]}"
        lr = degrade(hr)
        hr = hr[: SCALE * lr.shape[0], : SCALE * lr.shape[1]]
        with atomic_write(targets[path]) as temporary:
            np.save(temporary, np.concatenate([lr[None], hr.reshape(-1, *lr.shape)]))

    with lock(store), ThreadPool(min(os.cpu_count(), 16)) as pool:
        for stale in set(store.glob("*.npy")).difference(targets.values()):
            stale.unlink()
        todo = [path for path in targets if not is_prepared(path)]  # not in the threads: Python 3.11's ast fails there
        lines = dict(zip(todo, tqdm(pool.imap(prepare_image, todo), "preparing images", len(todo), disable=None)))
    for line in filter(None, lines.values()):
        print(f"left out: {line}", file=sys.stderr)
    usable = {path: target for path, target in targets.items() if not lines.get(path)}
    if not usable:
        raise UserError(f"{folder} has no usable images (of {len(targets)}): each needs {HR_PATCH}x{HR_PATCH} pixels")
    return usable


def patches(images: PreparedImages, batch_size: int, first_step: int, last_step: int, seed: int, jpeg=None):
    """A `tf.data.Dataset` of the batches of the steps after `first_step` up to `last_step`, uint8.

    They are LR `(n, 24, 24, 3)` and HR `(n, 96, 96, 3)`, and depend on `seed`, `batch_size` and the step alone, so a
    continued run has no state to restore. An epoch visits the images in random order, large ones more than once, each
    time at a random place, flipped and turned. With `jpeg`, as "70-95", half of the LR are saved in such qualities.
    """
    import tensorflow as tf

    low, high = map(int, jpeg.split("-")) if jpeg else (0, 0)
    # JPEG needs the whole blocks of 16x16 pixels that a patch lies in, wherever that is: 48x48 pixels.
    block, side = (16, 48) if jpeg else (1, LR_PATCH)
    span, positions = np.arange(side), np.arange(side * side, dtype=np.int32).reshape(side, side)
    visits = np.repeat(np.arange(len(images)), np.maximum(images.sizes.prod(axis=1) * SCALE**2 // VISIT_PIXELS, 1))

    def turn(square, way):  # the eight ways to flip and turn it
        square = square[:: -1 if way & 1 else 1, :: -1 if way & 2 else 1]
        return square.T if way & 4 else square

    turns = np.stack([turn(positions[:LR_PATCH, :LR_PATCH], way).ravel() for way in range(8)])
    order = functools.lru_cache(2)(lambda epoch: np.random.default_rng([seed, 0, epoch]).permutation(visits))

    def cut(step):
        numbers = np.arange(batch_size) + (step - 1) * batch_size
        chosen = np.array([order(epoch)[visit] for epoch, visit in zip(*divmod(numbers, len(visits)))])
        rng = np.random.default_rng([seed, 1, step])
        tops, lefts = rng.integers(0, images.sizes[chosen].T - LR_PATCH, endpoint=True)
        ways = rng.integers(0, 8, batch_size)
        qualities = rng.integers(0, 2, batch_size) * rng.integers(low, high, batch_size, endpoint=True)
        lrs, hrs = (np.empty((batch_size, n, n, 3), np.uint8) for n in (side, HR_PATCH))
        samples = np.stack([chosen, tops, lefts, ways], axis=1).tolist()
        for (i, y, x, way), lr_out, hr_out in zip(samples, lrs, hrs):
            lr, hr = images[i]
            lr = lr[y - y % block :, x - x % block :][:side, :side]
            lr.take(span, 0, mode="clip").take(span, 1, lr_out, mode="clip")  # JPEG, too, repeats the image's edge
            hr = hr[SCALE * y :, SCALE * x :][:HR_PATCH, :HR_PATCH]
            for channel in range(3):  # faster than all at once
                hr_out[..., channel] = turn(hr[..., channel], way)
        return lrs, hrs, np.int32(qualities), turns[ways] + np.int32(tops % block * side + lefts % block)[:, None]

    def compress_and_turn(lrs, hrs, qualities, places):
        lrs = tf.reshape(lrs, (batch_size, side, side, 3))
        if jpeg:
            which = tf.where(qualities > 0)
            one_by_one = {"fn_output_signature": tf.TensorSpec((side, side, 3), tf.uint8), "parallel_iterations": 1}
            code = functools.partial(tf.image.adjust_jpeg_quality, dct_method="INTEGER_ACCURATE")  # as Pillow
            coded = tf.map_fn(lambda n: code(lrs[n[0]], qualities[n[0]]), which, **one_by_one)
            lrs = tf.tensor_scatter_nd_update(lrs, which, coded)
        lrs = tf.gather(tf.reshape(lrs, (batch_size, side * side, 3)), places, batch_dims=1)
        hrs = tf.reshape(hrs, (batch_size, HR_PATCH, HR_PATCH, 3))
        return tf.reshape(lrs, (batch_size, LR_PATCH, LR_PATCH, 3)), hrs

    types, options = (tf.uint8, tf.uint8, tf.int32, tf.int32), tf.data.Options()
    options.threading.private_threadpool_size = os.cpu_count()  # training on a CPU has one thread
    steps = tf.data.Dataset.range(first_step + 1, last_step + 1).with_options(options)
    cuts = steps.map(lambda step: tf.numpy_function(cut, [step], types, stateful=False), 1, deterministic=True)
    return cuts.map(compress_and_turn, os.cpu_count(), deterministic=True).prefetch(4)
