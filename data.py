"""Pictures in and out of files, DIV2K, and the patches that training reads (Ledig et al. 2017, section 3.2).

Pictures are uint8 arrays `(height, width, 3)`, RGB, unless a docstring says otherwise.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import shutil
import sys
import threading
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

SCALE = 4
LR_PATCH, HR_PATCH = 24, 96
FOLDER = Path(__file__).resolve().parent / "data"  # DIV2K and the prepared pictures

# ---------------------------------------------------------------------------------------- pictures in and out of files

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


def list_pictures(folder):
    return sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in PICTURES and path.is_file())


def read_rgb(path):
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path} is not a readable picture: {error}") from None


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

# Decoding a 2K picture for every patch would starve the training. So a folder of pictures becomes one file, once:
# the pixels of all pictures (HR, then LR, of one after the other), then an index as JSON, then its length in 8 bytes.
FORMAT = 1
PARTS_OF_A_HUNDRED, MOST_VALID = 3, 10  # of a plain folder, for validation


class Pictures:
    """Prepared pictures, memory-mapped: `pictures[i]` is `(lr, hr)`.

    `lr` is `(h, w, 3)` and `hr` `(4h, 4w, 3)`, uint8, read-only views of the file. `names` holds the file names and
    `sizes`, `(len, 2)`, each h and w.
    """

    def __init__(self, pixels, records):
        self.pixels = pixels
        self.records = records  # [name, h, w, where its pixels start]
        self.names = [record[0] for record in records]
        self.sizes = np.array([record[1:3] for record in records], int).reshape(-1, 2)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        _, h, w, start = self.records[i]
        middle = start + SCALE * h * SCALE * w * 3
        hr = self.pixels[start:middle].reshape(SCALE * h, SCALE * w, 3)
        return self.pixels[middle : middle + h * w * 3].reshape(h, w, 3), hr


def load(data_dir=None):
    """The pictures to train on and to validate with: two `Pictures`, prepared on first use.

    `data_dir`: a folder with `train/` and `valid/`, or with `DIV2K_train_HR/` and `DIV2K_valid_HR/`, or just with
    pictures, of which a few, always the same, are kept for validation. None: DIV2K, downloaded on first use.
    Raises OSError or ValueError where pictures are missing, or cannot be downloaded or stored.
    """
    folder = Path(data_dir) if data_dir else download_div2k()
    for train, valid in (("DIV2K_train_HR", "DIV2K_valid_HR"), ("train", "valid")):
        if (folder / train).is_dir():
            train = prepare(folder / train)
            return (train, prepare(folder / valid)) if (folder / valid).is_dir() else split(train, folder)
    return split(prepare(folder), folder)


def split(pictures, folder):
    """Keep 3 in a hundred for validation, 1 to 10. The names alone decide which, so that one more picture moves no other."""
    if len(pictures) < 2:
        raise ValueError(f"{folder} needs at least 2 usable pictures, one of them for validation, and has {len(pictures)}")
    count = min(max(len(pictures) * PARTS_OF_A_HUNDRED // 100, 1), MOST_VALID)
    records = sorted(pictures.records, key=lambda record: hashlib.sha256(record[0].encode()).digest())
    return tuple(Pictures(pictures.pixels, sorted(some)) for some in (records[count:], records[:count]))


def prepare(folder):
    """The `Pictures` of a folder, decoded and degraded only if a name, size or time of its files has changed.

    Names each picture that cannot be used in one line on stderr. Raises ValueError if none can, OSError if there is
    no room for them.
    """
    files = list_pictures(folder)
    made_from = [FORMAT, [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]]
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    store = FOLDER / "prepared" / f"{folder.resolve().name}-{place}.pictures"
    opened = open_store(store, made_from)
    if not opened:
        with alone_in(store.parent):
            if not open_store(store, made_from):  # another process may have made it meanwhile
                write_store(store, made_from, files)
        opened = open_store(store, made_from)
    pixels, index = opened
    for reason in index["left_out"]:
        print(f"left out: {reason}", file=sys.stderr)
    if not index["pictures"]:
        raise ValueError(f"{folder} has no usable pictures: it needs some of at least {HR_PATCH}x{HR_PATCH} ({', '.join(sorted(PICTURES))})")
    return Pictures(pixels, index["pictures"])


@contextlib.contextmanager
def alone_in(folder):
    """Make the folder and keep other processes out: with several workers one downloads or prepares, the others wait."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "a") as lock:
            with contextlib.suppress(ImportError):  # not on Windows
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise OSError(f"cannot write to {folder} ({error.strerror}): the training pictures are kept there") from None
        raise


def check_room(folder, needed, what):
    """Raises OSError if fewer than `needed` bytes are free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{what} need {needed / 1e9:.1f} GB in {folder} and {free / 1e9:.1f} GB are free: make room first")


def open_store(store, made_from):
    """`(pixels, index)` of a prepared folder, or None if it was not prepared, or from other files."""
    try:
        pixels = np.asarray(np.memmap(store, np.uint8, "r"))
        index = json.loads(pixels[-8 - int.from_bytes(pixels[-8:].tobytes(), "little") : -8].tobytes())
    except (OSError, ValueError):
        return None
    return (pixels, index) if index["made_from"] == made_from else None


def write_store(store, made_from, files):
    """Decode and degrade in parallel. A picture in memory for each thread is all it takes, however many there are."""
    size = 0
    for path in files:
        with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError), Image.open(path) as image:
            size += image.width * image.height * 3
    check_room(store.parent, size * 17 // 16, f"{len(files)} prepared pictures")
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
    `batch_size` and its step alone, so that a continued run has no state to restore. An epoch visits each picture as
    often as it holds patches, in an order of its own, each time at a random place, flipped and turned in one of
    eight ways. `jpeg=(low, high)` compresses a half of the LR patches in these qualities. With several workers each
    takes its `part` of `parts` equal slices of every batch. Raises ValueError if the batch does not divide.
    """
    import tensorflow as tf

    if batch_size % parts or not 0 <= part < parts:
        raise ValueError(f"a batch must divide equally between the workers, got {batch_size} patches for {parts} (part {part})")
    mine = range(batch_size // parts * part, batch_size // parts * (part + 1))
    visits = np.repeat(np.arange(len(pictures), dtype=np.int32), np.maximum(pictures.sizes.prod(axis=1) // LR_PATCH**2, 1))

    @functools.lru_cache(2)  # a batch may end one epoch and begin the next
    def order(epoch):
        return np.random.default_rng([seed, 0, epoch]).permutation(visits)

    def batch(step):
        """Drawn for the whole batch, so that a sample is the same however many workers share it."""
        numbers = np.arange(batch_size) + (step - 1) * batch_size
        chosen = np.array([order(epoch)[visit] for epoch, visit in zip(*divmod(numbers, len(visits)))])
        rng = np.random.default_rng([seed, 1, step])
        tops, lefts = rng.integers(0, pictures.sizes[chosen].T - LR_PATCH, endpoint=True)
        turns = rng.integers(0, 8, batch_size)
        qualities = rng.integers(*jpeg, batch_size, endpoint=True) * rng.integers(0, 2, batch_size) if jpeg else 0 * turns
        lrs = np.empty((len(mine), LR_PATCH, LR_PATCH, 3), np.uint8)
        hrs = np.empty((len(mine), HR_PATCH, HR_PATCH, 3), np.uint8)
        for i, j in enumerate(mine):
            lr, hr = pictures[chosen[j]]
            top, left = tops[j], lefts[j]
            hr = hr[SCALE * top : SCALE * top + HR_PATCH, SCALE * left : SCALE * left + HR_PATCH]
            if qualities[j]:
                lr = compressed(lr, top, left, int(qualities[j]))
            else:
                lr = lr[top : top + LR_PATCH, left : left + LR_PATCH]
            turn(lr, turns[j], lrs[i])
            turn(hr, turns[j], hrs[i])
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


def turn(patch, way, out):
    """Write the patch into `out` in one of the eight ways to flip and turn a square; `way` is 0 to 7."""
    patch, out = patch.view("V3")[..., 0], out.view("V3")[..., 0]  # NumPy moves a whole pixel faster than three bytes
    patch = patch[:: -1 if way & 1 else 1, :: -1 if way & 2 else 1]
    out[...] = patch.T if way & 4 else patch


def compressed(lr, top, left, quality):
    """The LR patch at `top`, `left`, its JPEG blocks lying as if the whole picture had been saved, not aligned with the patch."""
    block = 16  # with the usual halved chroma
    above, before = top % block, left % block
    size = -(-(LR_PATCH + block) // block) * block
    with io.BytesIO() as file:
        Image.fromarray(lr[top - above :, left - before :][:size, :size]).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))[above : above + LR_PATCH, before : before + LR_PATCH]
