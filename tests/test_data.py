"""The degradation, scoring pairs, DIV2K, prepared images and patches. No network but 127.0.0.1."""

import hashlib
import http.server
import io
import os
import resource
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def coordinates(height, width):
    """An image whose every pixel tells where it is: red the row, green the column, blue what JPEG cannot keep."""
    y, x = np.mgrid[:height, :width]
    return np.dstack([y, x, y * x * 37 % 256]).astype(np.uint8)


def save(folder, images):
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def stored(cache):
    return {(path.name, path.stat().st_mtime_ns) for path in cache.rglob("*.npy")}


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


# The green of `synthetic()` in `imresize(hr, 1/4)`, rows and columns 4 to 11 of 16.
SYNTHETIC_LR = """70 195 56 191 76 157 120 110 184 87 144 134 97 178 63 198 149 89 177 71 182 80 161 110
    88 156 112 127 142 98 166 82 93 174 72 183 77 165 105 130 191 76 157 120 110 167 70 195
    134 97 178 63 198 59 184 87 71 182 80 161 110 124 149 89"""


def synthetic():
    y, x, c = np.ogrid[:64, :64, :3]
    return ((x // 3 + y // 5 + c) % 3 * 127).astype(np.uint8)


def test_degradation_is_matlabs():
    inner = np.s_[4:-4, 4:-4]
    np.testing.assert_array_equal(imresize(synthetic())[inner][..., 1].ravel(), np.int32(SYNTHETIC_LR.split()))
    np.testing.assert_array_equal(data.degrade(synthetic())[inner], imresize(synthetic())[inner])
    np.testing.assert_array_equal(data.degrade(noise(83, 66))[inner], imresize(noise(83, 66)[:80, :64])[inner])


def test_a_folder_says_in_one_line_what_it_leaves_out_or_where_there_are_images(tmp_path, capsys):
    names = ("b.png", "a.JPG", "._c.png", "more/e.png", "HR/f.png")
    photos = save(tmp_path / "photos", {name: noise(96, 96) for name in names})
    for name in ("notes.txt", "g.gif", "photo.heic"):
        (photos / name).touch()
    assert data.list_images(photos, photos / "HR") == [photos / "a.JPG", photos / "b.png"]
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "photos" in printed and "4 of 6 files and subfolders" in printed
    with pytest.raises(data.UserError, match="no images in .*photos"):
        data.list_images(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.UserError, match="no images in .*empty.*jpg"):
        data.list_images(tmp_path / "empty")


LAYOUTS = [("a_SRF_4_HR.png", "a_SRF_4_LR.png")]  # SelfExSR's, and then DIV2K's
LAYOUTS += [("HR/a.png", f"LR_bicubic/{name}.png") for name in ("X4/ax4", "ax4")]
LAYOUTS += [("HR/a.png", f"{lr}/{name}.bmp") for lr in ("LR", "LR_x4") for name in ("a", "ax4", "a_x4", "a_LR")]
LAYOUTS += [("a.png", "LR/a.png"), ("a.png", "ax4.png"), ("a.png", None), ("HR/ax4.png", None)]


@pytest.mark.parametrize("hr, lr", LAYOUTS)
def test_scoring_pairs_of_every_layout(tmp_path, hr, lr):
    hrs, lrs = ([path and path.replace("a", letter, 1) for letter in "ab"] for path in (hr, lr))
    save(tmp_path, {path: noise(40, 40) for path in hrs} | {path: noise(10, 10) for path in lrs if path})
    pairs = data.scoring_pairs(tmp_path)
    assert pairs == [(Path(h).stem, tmp_path / h, p and tmp_path / p) for h, p in zip(hrs, lrs)]
    small, large = data.read_pair(*pairs[0][1:])
    assert np.array_equal(large, noise(40, 40))
    assert np.array_equal(small, noise(10, 10) if lr else data.degrade(noise(40, 40)))
    for missing in (lrs[1], hrs[1]) if lr else ():
        (tmp_path / missing).rename(tmp_path / "away")
        with pytest.raises(data.UserError, match="has no partner"):
            data.scoring_pairs(tmp_path)
        (tmp_path / "away").rename(tmp_path / missing)


def test_what_cannot_be_scored_is_refused_and_the_rest_of_a_division_by_four_is_cut_off(tmp_path):
    save(tmp_path, {"a.png": noise(41, 43), "b.png": noise(8, 8), "c.png": noise(11, 10)})
    lr, hr = data.read_pair(tmp_path / "a.png", None)
    assert np.array_equal(hr, noise(41, 43)[:40, :40]) and np.array_equal(lr, data.degrade(hr))
    for hr, lr, words in (("b.png", None, "b.png is too small"), ("a.png", tmp_path / "c.png", "c.png is 10x11")):
        with pytest.raises(data.UserError, match=words):
            data.read_pair(tmp_path / hr, lr)


@pytest.mark.parametrize("train, valid", [("train/", "valid"), ("train/", "val"), ("", "validation")])
def test_images_are_prepared_once_and_again_when_changed_or_damaged(tmp_path, cache, train, valid):
    originals = {f"{train}{i}.png": noise(100 + i, 130 - i, i) for i in range(5)} | {f"{valid}/a.png": noise(96, 96)}
    photos = save(tmp_path / "photos", originals)
    images, validation = data.load(photos, cache)
    assert images.names == [f"{i}.png" for i in range(5)] and validation.names == ["a.png"] and len(images) == 5
    for i, (lr, hr) in enumerate(images):
        assert tuple(images.sizes[i]) == lr.shape[:2] and not hr.flags.owndata and not hr.flags.writeable
        np.testing.assert_array_equal(hr, originals[f"{train}{i}.png"][: (100 + i) // 4 * 4, : (130 - i) // 4 * 4])
        np.testing.assert_array_equal(lr, data.degrade(np.array(hr)))
    first = stored(cache)
    save(photos, {f"{valid}/a.png": noise(96, 100)})
    np.testing.assert_array_equal(data.load(photos, cache)[1][0][1], noise(96, 100))
    assert len(stored(cache) & first) == 5 and len(stored(cache)) == 6
    prepared = next(path for path in cache.rglob("*.npy") if valid in path.parent.name)
    whole = prepared.read_bytes()
    for damage in (b"", whole[:-5], whole[:50], bytes(1000)):
        prepared.unlink()
        prepared.write_bytes(damage)
        np.testing.assert_array_equal(data.load(photos, cache)[1][0][1], noise(96, 100))


def test_a_folder_trains_on_what_can_be_used_and_names_the_rest(tmp_path, cache, capsys):
    photos = save(tmp_path / "photos", {name: noise(120, 160) for name in ("train/a.png", "train/b.jpg")})
    save(photos, {"train/small.png": noise(96, 95)})
    (photos / "train" / "damaged.png").write_bytes((photos / "train" / "a.png").read_bytes()[:1000])
    for _ in range(2):  # prepared, and found prepared
        train, valid = data.load(photos, cache)  # without valid/ one of train/ validates
        assert sorted(train.names + valid.names) == ["a.png", "b.jpg"] and len(valid) == 1
        lines = capsys.readouterr().err.splitlines()
        assert [sum(name in line for line in lines) for name in ("small", "damaged")] == [1, 1]
    for name, words in (("a.png", "at least 2 usable images"), ("b.jpg", "no usable images")):
        (photos / "train" / name).unlink()
        with pytest.raises(data.UserError, match=words):
            data.load(photos, cache)


def test_the_split_of_a_plain_folder_is_stable_and_files_may_be_few(tmp_path, cache):
    photos = save(tmp_path / "photos", {f"{i:03}.bmp": noise(96, 96, i) for i in range(400)})
    code = """import data, sys
for images in data.load(*sys.argv[1:]):
    print(*[f"{name[:3]}:{hr.sum()}" for name, (_, hr) in zip(images.names, images)])"""
    few = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))}
    printed = subprocess.check_output([sys.executable, "-c", code, photos, cache], text=True, **few)
    train, valid = (dict(pair.split(":") for pair in line.split()) for line in printed.splitlines())
    assert len(valid) == 10 and train | valid == {f"{i:03}": str(noise(96, 96, i).sum()) for i in range(400)}
    (photos / f"{min(train)}.bmp").unlink()
    assert len({name[:3] for name in data.load(photos, cache)[1].names} - {*valid}) <= 1
    for path in sorted(photos.iterdir())[100:]:
        path.unlink()
    assert len(data.load(photos, cache)[1]) == 3  # of 100


def test_where_the_cache_lies(tmp_path, monkeypatch):
    """Beside the program, or, where that can't be written, in the user's cache folder."""
    photos = save(tmp_path / "photos", {f"{i}.png": noise(96, 96, i) for i in range(2)})
    monkeypatch.setattr(data, "__file__", str(tmp_path / "program" / "data.py"))
    (tmp_path / "program").mkdir()
    data.load(photos)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    data.load(photos)
    assert len(stored(tmp_path / "program" / "data")) == len(stored(tmp_path / "home" / "srgan")) == 2


def test_a_file_system_without_locks_is_used_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: os.stat("nowhere"))  # raises OSError, as on Lustre and some NFS
    with data.lock(tmp_path / "run", wait=False):
        pass


@pytest.fixture
def images(tmp_path, cache):
    photos = {"train/a.png": coordinates(192, 256), "train/b.png": coordinates(96, 96), "valid/a.png": noise(96, 96)}
    return data.load(save(tmp_path / "photos", photos), cache)[0]


def batches(*arguments, **keywords):
    return list(data.patches(*arguments, **keywords).as_numpy_iterator())


def same(some, others):
    return len(some) == len(others) and all((a == b).all() for one, two in zip(some, others) for a, b in zip(one, two))


@pytest.mark.parametrize("jpeg", [None, "30-95"])
def test_a_batch_depends_on_seed_and_step_alone(images, jpeg):
    whole = batches(images, 2, 0, 12, 5, jpeg)
    assert same(whole, batches(images, 2, 0, 12, 5, jpeg)) and same(whole[7:], batches(images, 2, 7, 12, 5, jpeg))
    assert not any(same([one], [other]) for one, other in zip(whole, batches(images, 2, 0, 12, 6, jpeg)))
    assert not any(same([one], [other]) for one, other in zip(whole, whole[1:]))
    assert batches(images, 1, 3, 3, 0, jpeg) == []


def test_an_epoch_visits_each_image_once_for_each_part_of_its_area(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(data, "VISIT_PIXELS", 100 * 100)
    sizes = {"a": (96, 96), "b": (200, 200), "c": (96, 320), "d": (100, 100)}
    values = {f"train/{name}.png": np.full((*size, 3), ord(name), np.uint8) for name, size in sizes.items()}
    images, _ = data.load(save(tmp_path, values | {"valid/a.png": noise(96, 96)}), cache)
    epochs = np.concatenate([hr[:, 0, 0, 0] for _, hr in batches(images, 3, 0, 27, seed=0)]).reshape(9, 9)
    assert all(bytes(sorted(epoch)) == b"abbbbcccd" for epoch in epochs)
    assert len({epoch.tobytes() for epoch in epochs}) == 9  # shuffled anew


def turned(patch, way):
    return np.rot90(patch if way < 4 else patch[:, ::-1], way % 4)


def found(hr):
    """Where a patch of `coordinates` lies, and how it was turned: `(top, left, way)`."""
    for way in range(8):
        top, left = map(int, turned(hr, way)[0, 0, :2])
        if np.array_equal(turned(hr, way), coordinates(192, 256)[top : top + 96, left : left + 96]):
            return top, left, way
    raise AssertionError("not a patch of the image")


def test_patches_are_aligned_turned_in_all_ways_and_from_everywhere(images):
    ((lrs, hrs),) = batches(images, 256, 0, 1, seed=1)
    places = [found(hr) for hr in hrs]
    for lr, (top, left, way) in zip(lrs, places):
        originals = [whole[top // 4 : top // 4 + 24, left // 4 : left // 4 + 24] for whole, _ in images]
        assert top % 4 == left % 4 == 0 and any(np.array_equal(turned(lr, way), original) for original in originals)
    tops, lefts, ways = zip(*places)
    assert min(ways.count(way) for way in range(8)) > 10
    assert {min(tops), max(tops), min(lefts), max(lefts)} == {0, 96, 160}


def test_jpeg_compresses_half_of_the_lr_patches_as_if_the_whole_image_had_been_saved(images):
    saved = []
    for lr, _ in images:
        Image.fromarray(lr).save(file := io.BytesIO(), "JPEG", quality=30)
        saved.append(np.asarray(Image.open(file)))
    ((clean, hrs),) = batches(images, 256, 0, 1, seed=1)
    ((lrs, same_hrs),) = batches(images, 256, 0, 1, seed=1, jpeg="30-30")
    np.testing.assert_array_equal(hrs, same_hrs)
    compressed = (lrs != clean).any(axis=(1, 2, 3))
    assert 0.4 < compressed.mean() < 0.6
    for lr, hr in zip(lrs[compressed], hrs[compressed]):
        top, left, way = found(hr)
        if top or left:  # of the large image, which ends with whole blocks
            crop = saved[0][top // 4 : top // 4 + 24, left // 4 : left // 4 + 24]
            np.testing.assert_array_equal(turned(lr, way)[1:-1, 1:-1], crop[1:-1, 1:-1])  # chroma blends at edges
    ((mixed, _),) = batches(images, 256, 0, 1, seed=1, jpeg="30-95")
    errors = [np.abs(lr[compressed].astype(int) - clean[compressed]).mean() for lr in (mixed, lrs)]
    assert 0 < errors[0] < errors[1] * 0.9


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        how = self.server.behaviour.pop(0) if self.server.behaviour else "well"
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.server.requests.append((self.path, start))
        body = self.server.files[self.path.lstrip("/")]
        body = bytes(len(body)) if how == "wrong" else body
        start = 0 if how == "ignores Range" else start
        self.send_response({"ignores Range": 200, "404": 404}.get(how, 206))
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : (start + len(body)) // 2 if how == "cuts" else None])


@pytest.fixture
def server(monkeypatch):
    """A tiny DIV2K: three images to train on, one to validate with. `behaviour` lists what the next requests get."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.behaviour, server.requests, server.files = [], [], {}
    for name, numbers in {"DIV2K_train_HR": (1, 2, 3), "DIV2K_valid_HR": (4,)}.items():
        with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
            for number in numbers:
                Image.fromarray(noise(96, 100, number)).save(image := io.BytesIO(), "PNG")
                archive.writestr(f"{name}/{number:04}.png", image.getvalue())
        server.files[f"{name}.zip"] = file.getvalue()
    table = {name[:-4]: (len(body), hashlib.sha256(body).hexdigest()) for name, body in server.files.items()}
    monkeypatch.setattr(data, "DIV2K", table)
    monkeypatch.setattr(data, "DIV2K_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


CASES = [("cuts", "well", "command"), ("cuts", "ignores Range", "command"), ("404", "well", "404")]


@pytest.mark.parametrize("first, second, words", [*CASES, ("wrong", "well", "published")])
def test_div2k_is_downloaded_once_continued_and_verified(server, cache, first, second, words):
    server.behaviour[:] = [first, second]
    with pytest.raises(OSError, match=words) as error:
        data.load(cache_dir=cache)
    assert "\n" not in str(error.value) and "DIV2K_train_HR.zip" in str(error.value)
    (cache / "DIV2K" / "DIV2K_valid_HR.zip").write_bytes(server.files["DIV2K_valid_HR.zip"])  # put there by the user
    for _ in range(2):
        train, valid = data.load(cache_dir=cache)
        assert train.names == ["0001.png", "0002.png", "0003.png"] and valid.names == ["0004.png"]
        np.testing.assert_array_equal(train[2][1], noise(96, 100, 3))
    assert [path.name for path in cache.rglob("*.zip*")] == ["DIV2K_valid_HR.zip"]
    assert [start > 0 for _, start in server.requests] == [False, first == "cuts"]
