"""Pictures in and out of files, DIV2K, and the patches that training reads (Ledig et al. 2017, section 3.2).

Pictures are uint8 arrays `(height, width, 3)`, RGB, unless a docstring says otherwise.
"""

import contextlib
import errno
import functools
import hashlib
import http.client
import io
import json
import os
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
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
            raise ValueError(f"{given} is not the published archive of {size} bytes, sha256 {sha256}: replace or remove it")
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
        raise OSError(f"{what} need {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free: make room first")


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
            return (train, prepare(folder / valid)) if (folder / valid).is_dir() else _split(train, folder)
    return _split(prepare(folder), folder)


def _split(pictures, folder):
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
        kinds = ", ".join(sorted(PICTURES))
        raise ValueError(
            f"{folder} has no usable pictures, of {len(files)}: put some of at least {HR_PATCH}x{HR_PATCH} there ({kinds}), "
            "or into train/ and valid/ below it"
        )
    return Pictures(pixels, index["pictures"])


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
        qualities = rng.integers(0, 2, batch_size) * rng.integers(*jpeg, batch_size, endpoint=True) if jpeg else 0 * turns
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
