"""DIV2K, prepared images, patches and the degradation. No network but 127.0.0.1, nothing outside the repository."""

import errno
import hashlib
import http.server
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import data
import main

ROOT = Path(data.__file__).resolve().parent


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def coordinates(height, width):
    """A image whose every pixel tells where it is: red the row, green the column, blue what JPEG cannot keep."""
    y, x = np.mgrid[:height, :width]
    return np.dstack([y, x, y * x * 37 % 256]).astype(np.uint8)


def save(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        Image.fromarray(image).save(folder / name)
    return folder


def turned(patch, way):
    return np.rot90(patch if way < 4 else patch[:, ::-1], way % 4)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where DIV2K and the prepared images go in a test."""
    monkeypatch.setattr(data, "FOLDER", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images decoded so far."""
    names, read_rgb = [], data.read_rgb
    monkeypatch.setattr(data, "read_rgb", lambda path: names.append(Path(path).name) or read_rgb(path))
    return names


# ------------------------------------------------------------------------------------------------ the 4x degradation


def imresize(hr):
    """MATLAB's `imresize(hr, 1/4)` in double precision: antialiased cubic, mirrored edges, rounded after each pass."""
    image = hr.astype(float)
    for axis in (0, 1):
        side = hr.shape[axis]
        taps = np.arange(side // 4)[:, None] * 4 - 7 + np.arange(18)  # around centres at 4 i + 1.5
        distance = np.abs(taps - (np.arange(side // 4)[:, None] * 4 + 1.5)) / 4
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
        weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
        weights /= weights.sum(axis=1, keepdims=True)
        taps %= 2 * side
        taps = np.where(taps < side, taps, 2 * side - 1 - taps)
        image = np.moveaxis(np.einsum("ot,ot...->o...", weights, np.moveaxis(image, axis, 0)[taps]), 0, axis)
        image = np.floor(np.clip(image, 0, 255) + 0.5)
    return image.astype(np.uint8)


SYNTHETIC_LR = [  # the green of `synthetic()` in `imresize(hr, 1/4)`, rows and columns 4 to 11 of 16
    [70, 195, 56, 191, 76, 157, 120, 110],
    [184, 87, 144, 134, 97, 178, 63, 198],
    [149, 89, 177, 71, 182, 80, 161, 110],
    [88, 156, 112, 127, 142, 98, 166, 82],
    [93, 174, 72, 183, 77, 165, 105, 130],
    [191, 76, 157, 120, 110, 167, 70, 195],
    [134, 97, 178, 63, 198, 59, 184, 87],
    [71, 182, 80, 161, 110, 124, 149, 89],
]


def synthetic():
    y, x, c = np.ogrid[:64, :64, :3]
    return ((x // 3 + y // 5 + c) % 3 * 127).astype(np.uint8)


def test_degradation_is_matlabs():
    inner = np.s_[4:-4, 4:-4]
    np.testing.assert_array_equal(imresize(synthetic())[inner][..., 1], SYNTHETIC_LR)
    np.testing.assert_array_equal(data.degrade(synthetic())[inner], imresize(synthetic())[inner])
    np.testing.assert_array_equal(data.degrade(noise(80, 64))[inner], imresize(noise(80, 64))[inner])
    in_one_go = Image.fromarray(synthetic()).resize((16, 16), Image.Resampling.BICUBIC)
    assert (np.asarray(in_one_go) != imresize(synthetic()))[inner].any()  # so this image can tell


# ------------------------------------------------------------------------------------------------- prepared images


def test_prepared_images_are_cropped_and_degraded(tmp_path):
    originals = {f"{i}.png": noise(100 + i, 130 - i, seed=i) for i in range(5)}
    images = data.prepare(save(tmp_path / "photos", originals))
    assert images.names == sorted(originals)
    assert len(images) == len(list(images)) == 5
    for i, (lr, hr) in enumerate(images):
        assert lr.dtype == hr.dtype == np.uint8
        assert not hr.flags.owndata and not hr.flags.writeable
        np.testing.assert_array_equal(hr, originals[f"{i}.png"][: (100 + i) // 4 * 4, : (130 - i) // 4 * 4])
        np.testing.assert_array_equal(lr, data.degrade(np.array(hr)))


def stored(folder):
    """The prepared files, and whatever else lies beside them."""
    return [path for path in (folder / "prepared").rglob("*") if path.is_file() and path.name != ".lock"]


def test_only_images_that_are_new_or_changed_are_prepared(tmp_path, folder, decoded):
    photos = save(tmp_path / "photos", {"a.png": noise(96, 96, 1), "b.png": noise(96, 96, 2)})
    first = data.prepare(photos).fingerprint
    assert sorted(decoded) == ["a.png", "b.png"]
    decoded.clear()
    assert data.prepare(photos).fingerprint == first and decoded == []

    save(photos, {"c.png": noise(96, 96, 3)})
    assert data.prepare(photos).names == ["a.png", "b.png", "c.png"] and decoded == ["c.png"]
    save(photos, {"a.png": noise(96, 96, 4)})
    np.testing.assert_array_equal(data.prepare(photos)[0][1], noise(96, 96, 4))
    os.utime(photos / "b.png", (1, 1))
    images = data.prepare(photos)
    assert decoded == ["c.png", "a.png", "b.png"] and images.fingerprint != first
    assert len(stored(folder)) == 3
    (photos / "b.png").unlink()
    assert data.prepare(photos).names == ["a.png", "c.png"] and len(stored(folder)) == 2


def test_another_degradation_or_a_damaged_file_is_prepared_again(tmp_path, folder, decoded, monkeypatch):
    photos = save(tmp_path / "photos", {"a.png": noise(96, 96), "b.png": noise(96, 96, 1)})
    data.prepare(photos)
    monkeypatch.setattr(data, "DEGRADATION", data.DEGRADATION + 1)
    data.prepare(photos)
    assert sorted(decoded) == ["a.png", "a.png", "b.png", "b.png"]
    decoded.clear()
    path = next(path for path in stored(folder) if (np.load(path)[1:].ravel() == noise(96, 96).ravel()).all())
    other, pickled = io.BytesIO(), io.BytesIO()
    np.save(other, np.zeros((24, 24, 3), np.uint8))
    np.save(pickled, np.array([{}]))
    whole = path.read_bytes()
    for damage in (b"", whole[:-5], whole[:50], bytes(1000), other.getvalue(), pickled.getvalue()):
        path.unlink()
        path.write_bytes(damage)
        np.testing.assert_array_equal(data.prepare(photos)[0][1], noise(96, 96))
    assert decoded == 6 * ["a.png"]


def test_prepared_files_are_the_users_own(tmp_path, folder):
    data.prepare(save(tmp_path / "photos", {"a.png": noise(96, 96)}))
    (path,) = stored(folder)
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_more_images_than_files_may_be_open(tmp_path):
    photos = save(tmp_path / "photos", {f"{i}.png": noise(96, 96, i) for i in range(200)})
    code = """
for images in data.load(sys.argv[2]):
    assert all((hr[::4, ::4].shape == lr.shape for lr, hr in images)), images
    print(len(images), file=sys.stderr)
"""
    process = run(code, photos, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100)))
    lines = process.communicate()[1].decode().splitlines()
    assert process.returncode == 0 and lines[-2:] == ["194", "6"], lines


def test_folders_of_one_name_have_stores_of_their_own(tmp_path):
    for i in (1, 2):
        save(tmp_path / str(i) / "photos", {"a.png": noise(96, 96, i)})
    for i in (1, 2, 1):
        np.testing.assert_array_equal(data.prepare(tmp_path / str(i) / "photos")[0][1], noise(96, 96, i))


def hostile_images(photos):
    """Images as people have them. Returns the sizes of those that can be used, as LR rows and columns."""
    image = Image.fromarray(noise(120, 160))
    photos.mkdir()
    (photos / "empty.png").touch()
    (photos / "text.png").write_text("not a image\n")
    file = io.BytesIO()
    image.save(file, "JPEG")
    (photos / "truncated.jpg").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    Image.new("RGB", (1, 1)).save(photos / "one.png")
    Image.new("RGB", (20000, 10)).save(photos / "strip.png")
    (photos / "folder.png").mkdir()
    (photos / "notes.txt").write_text("no image, and none is expected")
    image.convert("CMYK").save(photos / "cmyk.jpg")
    Image.fromarray(noise(120, 160)[..., 0].astype(np.uint16) * 257).save(photos / "16bit.png")
    image.quantize(16).save(photos / "palette.png", transparency=0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(photos / "turned.jpg", exif=exif)
    image.save(photos / "animated.gif", save_all=True, append_images=[image.rotate(180)])
    image.save(photos / "plain.webp")
    usable = dict.fromkeys(["cmyk.jpg", "16bit.png", "palette.png", "animated.gif", "plain.webp"], (30, 40))
    return usable | {"turned.jpg": (40, 30)}


def test_hostile_folder_trains_on_what_can_be_used_and_names_the_rest(tmp_path, capfd):
    usable = hostile_images(tmp_path / "photos")
    for _ in range(2):  # prepared, and found prepared
        train, valid = data.load(tmp_path / "photos")
        sizes = {name: tuple(size) for images in (train, valid) for name, size in zip(images.names, images.sizes)}
        assert sizes == usable and len(valid) == 1
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("left out: ")]
        assert len(lines) == 5
        for name in ("empty.png", "text.png", "truncated.jpg", "one.png", "strip.png"):
            assert sum(name in line for line in lines) == 1, name
    batches = list(data.patches(train, 8, 0, 3, seed=0))
    assert len(batches) == 3


@pytest.mark.parametrize("files", [[], ["notes.txt"], ["empty.png"]])
def test_a_folder_without_usable_images_is_one_clear_error(tmp_path, files):
    (tmp_path / "photos").mkdir()
    for file in files:
        (tmp_path / "photos" / file).touch()
    with pytest.raises(ValueError, match="no usable images") as error:
        data.load(tmp_path / "photos")
    assert "\n" not in str(error.value) and str(tmp_path / "photos") in str(error.value)


def test_one_image_is_too_few_to_train_and_validate(tmp_path):
    with pytest.raises(ValueError, match="at least 2 usable images"):
        data.load(save(tmp_path / "photos", {"a.png": noise(96, 96)}))


def test_layouts(tmp_path):
    names = {"train": ["a.png", "b.png"], "valid": ["c.png"]}
    for layout in ("{}", "DIV2K_{}_HR"):
        root = tmp_path / layout
        for part in names:
            save(root / layout.format(part), {name: noise(96, 96) for name in names[part]})
        train, valid = data.load(root)
        assert train.names == names["train"] and valid.names == names["valid"]
    save(tmp_path / "only" / "train", {name: noise(96, 96) for name in "a.png b.png".split()})
    train, valid = data.load(tmp_path / "only")
    assert sorted(train.names + valid.names) == ["a.png", "b.png"] and len(valid) == 1


@pytest.mark.parametrize("count, kept", [(2, 1), (40, 1), (100, 3), (400, 10)])
def test_the_split_of_a_plain_folder_is_stable(tmp_path, monkeypatch, count, kept):
    photos = save(tmp_path / "photos", {f"{i:03}.png": noise(96, 96, i) for i in range(count)})
    train, valid = data.load(photos)
    assert len(valid) == kept
    assert sorted(train.names + valid.names) == sorted(path.name for path in photos.iterdir())
    assert valid.names == data.load(photos)[1].names
    number = int(valid.names[0][:3])
    np.testing.assert_array_equal(valid[0][1], noise(96, 96, number))


def run(code, *arguments, **options):
    """Start Python on `code`, with `data.FOLDER` as in this test, to be killed or waited for."""
    settings = {name: getattr(data, name) for name in ("DIV2K", "DIV2K_URL")} | {"FOLDER": str(data.FOLDER)}
    code = f"""
import json, os, pathlib, signal, sys
import data
settings = json.loads(sys.argv[1])
data.FOLDER, data.DIV2K, data.DIV2K_URL = pathlib.Path(settings["FOLDER"]), settings["DIV2K"], settings["DIV2K_URL"]
{code}
"""
    command = [sys.executable, "-c", code, json.dumps(settings), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, **options)


KILL = """
import http.client
read1 = http.client.HTTPResponse.read1
http.client.HTTPResponse.read1 = lambda answer, size: read1(answer, min(size, 5000))  # so that an archive takes many
(place, name), count = sys.argv[2].rsplit(".", 1), int(sys.argv[3])
original = getattr(eval(place), name)

def killing(*arguments, **keywords):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **keywords)

setattr(eval(place), name, killing)
data.load(*sys.argv[4:])
"""


@pytest.mark.parametrize(
    "place, count", [("data.degrade", 1), ("data.degrade", 4), ("data.os.fsync", 1), ("data.os.replace", 1)]
)
def test_killed_while_preparing(tmp_path, folder, place, count):
    photos = save(tmp_path / "photos", {f"{i}.png": noise(96, 100, i) for i in range(6)})
    process = run(KILL, place, count, photos)
    process.communicate()
    assert process.returncode == -9
    assert len([path for path in stored(folder) if path.suffix == ".npy" and path.parent.name[0] != "."]) < 6
    images = data.prepare(photos)
    assert [path.suffix for path in stored(folder)] == 6 * [".npy"]
    assert len(list((folder / "prepared").rglob("*"))) == 8  # nothing is left but them, their folder and the lock
    for i in range(6):
        np.testing.assert_array_equal(images[i][1], noise(96, 100, i))


def test_two_processes_prepare_a_folder_once(tmp_path):
    photos = save(tmp_path / "photos", {f"{i}.png": noise(96, 100, i) for i in range(10)})
    code = """
import time
degrade = data.degrade
def slowly(hr):
    time.sleep(0.1)
    print("degraded", file=sys.stderr)
    return degrade(hr)
data.degrade = slowly
print("images", len(data.prepare(pathlib.Path(sys.argv[2]))), file=sys.stderr)
"""
    errors = [process.communicate()[1].decode() for process in [run(code, photos), run(code, photos)]]
    assert all("images 10" in error for error in errors), errors
    assert sum(error.count("degraded") for error in errors) == 10


def test_too_little_room_is_said_before_anything_is_written(tmp_path, folder, monkeypatch):
    photos = save(tmp_path / "photos", {f"{i}.png": noise(400, 400) for i in range(3)})
    needed = 3 * 400 * 400 * 3 * 17 // 16
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(OSError, match="3 prepared images need 0.0 GB .* 0.0 GB are free"):
        data.prepare(photos)
    assert stored(folder) == []
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    assert len(data.prepare(photos)) == 3


@pytest.mark.parametrize("code, words", [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only file system")])
def test_a_disk_that_is_full_or_read_only_is_one_clear_error(tmp_path, folder, monkeypatch, capsys, code, words):
    def fail(place, *_, **__):
        raise OSError(code, os.strerror(code), *([str(place)] if isinstance(place, Path) else []))

    photos = save(tmp_path / "photos", {"a.png": noise(96, 96)})
    monkeypatch.setattr(*((data.os, "fsync") if code == errno.ENOSPC else (Path, "mkdir")), fail)
    with pytest.raises(OSError) as error:
        data.prepare(photos)
    main.report(error.value)
    printed = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(f"main.py: .*prepared.*: {words}.*", printed)
    assert not folder.exists() or stored(folder) == []


def test_memory_does_not_grow_with_the_folder(tmp_path):
    """Sixty images of 2.2 MB, 140 MB prepared, take no more memory than six."""
    code = """
import resource
data.prepare(pathlib.Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""
    image, peaks = noise(860, 860), []
    for count in (6, 60):
        photos = save(tmp_path / f"photos{count}", {f"{i}.bmp": image for i in range(count)})
        peaks.append(int(run(code, photos).communicate()[1].split()[-1]))
    assert peaks[1] - peaks[0] < 30_000, peaks  # KB


# ------------------------------------------------------------------------------------------------------------ patches


@pytest.fixture
def images(tmp_path):
    return data.prepare(save(tmp_path / "photos", {"a.png": coordinates(200, 240), "b.png": coordinates(96, 96)}))


def batches(*arguments, **keywords):
    return list(data.patches(*arguments, **keywords).as_numpy_iterator())


def same(some, others):
    return len(some) == len(others) and all(
        (a == b).all() for one, other in zip(some, others) for a, b in zip(one, other)
    )


def test_importing_data_leaves_tensorflow_alone():
    process = run('assert "tensorflow" not in sys.modules and "keras" not in sys.modules')
    assert process.communicate() and process.returncode == 0


def test_patches_have_static_shapes_and_stay_uint8(images):
    dataset = data.patches(images, 6, 0, 3, seed=0)
    lr, hr = dataset.element_spec
    assert (lr.shape, hr.shape) == ((6, 24, 24, 3), (6, 96, 96, 3))
    assert lr.dtype == hr.dtype == "uint8"
    assert len(list(dataset)) == 3 and not list(data.patches(images, 6, 3, 3, seed=0))


def test_a_batch_depends_on_seed_and_step_alone(images):
    whole = batches(images, 4, 0, 12, seed=5)
    assert same(whole, batches(images, 4, 0, 12, seed=5))
    assert same(whole[7:], batches(images, 4, 7, 12, seed=5))
    assert not any(same([one], [other]) for one, other in zip(whole, batches(images, 4, 0, 12, seed=6)))
    assert not any(same([one], [other]) for one, other in zip(whole, whole[1:]))


def test_an_epoch_visits_each_image_once_for_each_part_of_its_area(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "VISIT_PIXELS", 100 * 100)
    sizes = {"a": (96, 96), "b": (200, 200), "c": (96, 320), "d": (100, 100)}
    values = {f"{name}.png": np.full((*size, 3), ord(name), np.uint8) for name, size in sizes.items()}
    images = data.prepare(save(tmp_path / "photos", values))
    seen = np.concatenate([hr[:, 0, 0, 0] for _, hr in batches(images, 3, 0, 27, seed=0)])
    epochs = seen.reshape(9, 9)
    for epoch in epochs:
        assert bytes(sorted(epoch)) == b"abbbbcccd"
    assert len({epoch.tobytes() for epoch in epochs}) == 9  # shuffled anew


def found(hr):
    """Where a patch of `coordinates` lies, and how it was turned: `(top, left, way)`."""
    for way in range(8):
        patch = turned(hr, way)
        top, left = map(int, patch[0, 0, :2])
        if patch[-1, 0, 0] == top + 95 and patch[0, -1, 1] == left + 95 and patch[0, -1, 0] == top:
            np.testing.assert_array_equal(patch, coordinates(200, 240)[top : top + 96, left : left + 96])
            return top, left, way
    raise AssertionError("not a patch of the image")


def test_patches_are_aligned_turned_in_all_ways_and_from_everywhere(images):
    places = []
    ((lrs, hrs),) = batches(images, 256, 0, 1, seed=1)
    by_size = {hr.shape[0]: lr for lr, hr in images}
    for lr, hr in zip(lrs, hrs):
        top, left, way = found(hr)
        assert top % 4 == left % 4 == 0
        crop = np.s_[top // 4 : top // 4 + 24, left // 4 : left // 4 + 24]
        # Both images begin alike, but degraded they differ near the edges of the small one.
        assert any(
            np.array_equal(turned(lr, way), whole[crop]) for whole in by_size.values() if whole[crop].shape == lr.shape
        )
        inner = np.abs(data.degrade(np.ascontiguousarray(turned(hr, way))).astype(int) - turned(lr, way))[4:-4, 4:-4]
        assert inner.max() == 0
        places.append((top, left, way))
    tops, lefts, ways = zip(*places)
    assert set(ways) == set(range(8)) and min(ways.count(way) for way in range(8)) > 10
    assert {min(tops), max(tops), min(lefts), max(lefts)} == {0, 104, 144}


def test_jpeg_compresses_half_of_the_lr_patches_as_if_the_whole_image_had_been_saved(tmp_path):
    images = data.prepare(save(tmp_path / "photos", {"a.png": coordinates(200, 240)}))
    whole = np.array(images[0][0])
    file = io.BytesIO()
    Image.fromarray(whole).save(file, "JPEG", quality=30)
    saved = np.asarray(Image.open(file))
    ((clean, hr),) = batches(images, 256, 0, 1, seed=1)
    ((lr, same_hr),) = batches(images, 256, 0, 1, seed=1, jpeg="30-30")
    np.testing.assert_array_equal(hr, same_hr)
    compressed = (lr != clean).any(axis=(1, 2, 3))
    assert 0.4 < compressed.mean() < 0.6
    for patch, target in zip(lr[compressed], hr[compressed]):
        top, left, way = found(target)
        expected = saved[top // 4 : top // 4 + 24, left // 4 : left // 4 + 24]
        np.testing.assert_array_equal(turned(patch, way)[1:-1, 1:-1], expected[1:-1, 1:-1])  # chroma blends at edges


def test_jpeg_qualities_cover_their_range(images):
    def error(jpeg):
        ((lr, _),) = batches(images, 256, 0, 1, seed=1, jpeg=jpeg)
        return np.abs(lr.astype(int) - clean).mean(axis=(1, 2, 3))

    ((clean, _),) = batches(images, 256, 0, 1, seed=1)
    low, high, mixed = error("5-5"), error("95-95"), error("5-95")
    hit = low > 0
    assert (high[hit] < low[hit]).all()
    assert (mixed[hit] <= low[hit] * 1.2).all() and len(np.unique(mixed[hit])) > 30
    assert mixed[hit].mean() < 0.8 * low[hit].mean() and mixed[hit].mean() > 1.2 * high[hit].mean()


# -------------------------------------------------------------------------------------------------------------- DIV2K


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        how = server.behaviour.pop(0) if server.behaviour else "well"
        server.requests.append((self.path, self.headers.get("Range"), how))
        if how in ("404", "503"):
            return self.send_error(int(how))
        if how == "stalls at once":
            return server.released.wait(20)
        body = server.files[self.path.lstrip("/")]
        if how == "wrong":
            body = bytes(len(body))
        start = 0
        if how == "short file":
            body = body[:-1]
        if self.headers.get("Range") and how != "ignores Range":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            at = 0 if how == "wrong range" else start
            self.send_header("Content-Range", f"bytes {at}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        middle = (start + len(body)) // 2
        self.wfile.write(body[start:middle])
        self.wfile.flush()
        if how == "stalls":
            server.released.wait(20)  # until the test is over
        if how not in ("cuts", "stalls"):
            self.wfile.write(body[middle:])

    def log_message(self, *_):
        pass


def archive(name, numbers):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        for number in numbers:
            image = io.BytesIO()
            Image.fromarray(noise(96, 100, number)).save(image, "PNG")
            opened.writestr(f"{name}/{number:04}.png", image.getvalue())
    return file.getvalue()


@pytest.fixture
def server(monkeypatch):
    """A tiny DIV2K: three images to train on, one to validate with. `behaviour` lists what the next requests get."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.behaviour, server.requests, server.released = [], [], threading.Event()
    numbers = {"DIV2K_train_HR": (1, 3), "DIV2K_valid_HR": (4, 4)}
    server.files = {f"{name}.zip": archive(name, range(a, b + 1)) for name, (a, b) in numbers.items()}
    server.publish = lambda: monkeypatch.setattr(
        data,
        "DIV2K",
        {
            name: (len(body), hashlib.sha256(body).hexdigest())
            for name, body in ((file.removesuffix(".zip"), body) for file, body in server.files.items())
        },
    )
    server.publish()
    monkeypatch.setattr(data, "DIV2K_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(data, "WAITS", (0.01, 0.02))
    monkeypatch.setattr(data, "TIMEOUT", 0.3)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def check_whole(folder):
    """DIV2K is there, right, and nothing else is left."""
    train, valid = data.load()
    assert train.names == ["0001.png", "0002.png", "0003.png"] and valid.names == ["0004.png"]
    for i in range(3):
        np.testing.assert_array_equal(train[i][1], noise(96, 100, i + 1))
    np.testing.assert_array_equal(valid[0][1], noise(96, 100, 4))
    assert sorted(path.name for path in (folder / "DIV2K").iterdir()) == [".lock", "DIV2K_train_HR", "DIV2K_valid_HR"]


def test_div2k_is_downloaded_once(server, folder):
    check_whole(folder)
    assert server.requests == [("/DIV2K_train_HR.zip", None, "well"), ("/DIV2K_valid_HR.zip", None, "well")]
    check_whole(folder)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "behaviour, ranges",
    [
        (["cuts"], [False, True]),
        (["stalls"], [False, True]),
        (["503"], [False, False]),
        (["503", "503"], [False, False, False]),
        (["cuts", "cuts", "cuts", "cuts", "cuts"], [False] + 5 * [True]),  # each brings some more
        (["503", "cuts", "503"], [False, False, True, True]),  # and the tries begin anew
        (["cuts", "ignores Range"], [False, True]),
        (["cuts", "wrong range"], [False, True, True]),
        (["short file"], [False, False]),
    ],
)
def test_a_failing_server_is_tried_again(server, folder, behaviour, ranges):
    server.behaviour[:] = behaviour
    check_whole(folder)
    requests = [request for request in server.requests if request[0] == "/DIV2K_train_HR.zip"]
    assert [bool(request[1]) for request in requests] == ranges
    assert [request[2] for request in requests] == behaviour + ["well"] * (len(ranges) - len(behaviour))


@pytest.mark.parametrize(
    "behaviour, tries, words",
    [
        ("404", 1, "404"),
        ("503", 3, "503"),
        ("stalls at once", 3, "timed out"),
        ("wrong", 1, "not the published archive"),
        ("short file", 3, "doesn't offer"),
    ],
)
def test_a_server_that_never_gets_better_is_one_clear_error_and_the_next_run_goes_on(
    server, folder, behaviour, tries, words
):
    server.behaviour[:] = [behaviour] * 100
    with pytest.raises((OSError, ValueError), match=words) as error:
        data.load()
    assert "\n" not in str(error.value) and "DIV2K_train_HR.zip" in str(error.value)
    assert len(server.requests) == tries
    if isinstance(error.value, OSError):
        assert str(folder / "DIV2K") in str(error.value)
    server.behaviour.clear()
    check_whole(folder)


def test_no_network_is_one_clear_error(server, folder, monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        monkeypatch.setattr(data, "DIV2K_URL", f"http://127.0.0.1:{closed.server_port}/")
    with pytest.raises(OSError, match="can't download .*refused.*put the file into .*DIV2K,"):
        data.load()


def test_archives_the_user_put_there_are_used_checked_and_kept(server, folder):
    (folder / "DIV2K").mkdir(parents=True)
    for name, body in server.files.items():
        (folder / "DIV2K" / name).write_bytes(body)
    train, valid = data.load()
    assert (len(train), len(valid), server.requests) == (3, 1, [])
    assert all((folder / "DIV2K" / name).read_bytes() == body for name, body in server.files.items())

    shutil.rmtree(folder / "DIV2K" / "DIV2K_valid_HR")
    (folder / "DIV2K" / "DIV2K_valid_HR.zip").write_bytes(b"something else")
    with pytest.raises(ValueError, match="DIV2K_valid_HR.zip is damaged or not the published archive"):
        data.load()
    assert (folder / "DIV2K" / "DIV2K_valid_HR.zip").read_bytes() == b"something else"


def test_room_for_div2k_is_checked_before_downloading(server, folder, monkeypatch):
    needed = 3 * len(server.files["DIV2K_train_HR.zip"])  # archive, images, prepared images
    (folder / "DIV2K").mkdir(parents=True)
    (folder / "DIV2K" / "DIV2K_train_HR.zip.part").write_bytes(server.files["DIV2K_train_HR.zip"][:1000])
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1001))
    with pytest.raises(OSError, match="DIV2K_train_HR and its prepared images need .* GB in .* are free"):
        data.download_div2k()
    assert not server.requests
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1000))
    check_whole(folder)


def test_the_published_div2k():
    """Pinned, since a typing error in here costs someone a download of 4 GB."""
    assert data.DIV2K_URL == "https://data.vision.ee.ethz.ch/cvl/DIV2K/"
    assert {name: size for name, (size, _) in data.DIV2K.items()} == {
        "DIV2K_train_HR": 3530603713,
        "DIV2K_valid_HR": 448993893,
    }
    assert [entry[1][:8] for entry in data.DIV2K.values()] == ["9d0b9c46", "20dd31fd"]


@pytest.mark.parametrize(
    "place, count",
    [
        ("http.client.HTTPResponse.read1", 2),
        ("http.client.HTTPResponse.read1", 20),
        ("data.hashlib.file_digest", 1),
        ("data.shutil.copyfileobj", 3),
        ("pathlib.Path.rename", 1),
        ("data.shutil.rmtree", 2),
        ("pathlib.Path.unlink", 1),
        ("data.degrade", 3),
    ],
)
def test_killed_at_any_point_the_next_run_puts_it_right(server, folder, place, count):
    process = run(KILL, place, count)
    process.communicate()
    assert process.returncode == -9
    check_whole(folder)
