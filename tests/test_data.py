"""The degradation, scoring pairs, DIV2K, prepared images and patches. No network but 127.0.0.1."""

import hashlib
import http.server
import io
import os
import resource
import subprocess
import sys
import threading
import time
import zipfile

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
    """Write images, by the names of their files."""
    for name, image in images.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def stored(cache):
    """The prepared files, with the times of their writing."""
    return {(path.name, path.stat().st_mtime_ns) for path in cache.rglob("*.npy")}


# ---- The degradation ----


def imresize(hr):
    """MATLAB's `imresize(hr, 1/4)` in double precision: antialiased cubic, mirrored edges, rounded after each pass."""
    image = hr.astype(float)
    for axis in (0, 1):
        side = hr.shape[axis]
        centres = np.arange(side // 4)[:, None] * 4 + 1.5
        taps = np.arange(side // 4)[:, None] * 4 - 7 + np.arange(18)
        distance = np.abs(taps - centres) / 4
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
        weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
        weights /= weights.sum(axis=1, keepdims=True)
        taps %= 2 * side
        taps = np.where(taps < side, taps, 2 * side - 1 - taps)
        sums = np.einsum("ot,ot...->o...", weights, np.moveaxis(image, axis, 0)[taps])
        image = np.floor(np.clip(np.moveaxis(sums, 0, axis), 0, 255) + 0.5)
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
    expected = imresize(synthetic())[inner]
    np.testing.assert_array_equal(expected[..., 1].ravel(), np.int32(SYNTHETIC_LR.split()))
    np.testing.assert_array_equal(data.degrade(synthetic())[inner], expected)
    np.testing.assert_array_equal(data.degrade(noise(83, 66))[inner], imresize(noise(83, 66)[:80, :64])[inner])


# ---- Files and folders ----


def test_a_folder_names_what_it_leaves_out(tmp_path):
    names = ("b.png", "a.JPG", "._c.png", "more/e.png", "HR/f.png")
    photos = save(tmp_path, {name: noise(96, 96) for name in names})
    for name in ("notes.txt", "g.gif", "photo.heic"):
        (photos / name).touch()
    with pytest.warns(
        UserWarning, match=f"^{photos}: left out 4 of its files and folders: g.gif, more, notes.txt, photo.heic$"
    ):
        images = data.list_images(photos, photos / "HR")
    assert images == [photos / "a.JPG", photos / "b.png"]
    for i in range(3):
        (photos / f"a{i}.jxl").touch()
    (photos / "z.png").symlink_to("a" * 300)  # more than a name may have
    with pytest.warns(UserWarning, match="left out 8 .*: a0.jxl, a1.jxl, a2.jxl, g.gif, more, ...$"):
        data.list_images(photos, photos / "HR")


def test_a_folder_without_images_says_where_some_are(tmp_path):
    save(tmp_path, {"more/deep/e.png": noise(9, 9)})
    with pytest.raises(data.UserError, match=f"^no images in {tmp_path}: there are some in {tmp_path}/more/deep$"):
        data.list_images(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.UserError, match=f"^no images in {tmp_path}/empty: supported are .*jpg"):
        data.list_images(tmp_path / "empty")


def test_a_file_system_without_locks_is_used_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: os.stat("nowhere"))  # raises OSError, as on Lustre and some NFS
    with data.lock(tmp_path / "run", wait=False):
        pass


def test_waiting_for_a_lock_is_told(tmp_path):
    entered = threading.Event()

    def enter():
        with data.lock(tmp_path):
            entered.set()

    waiting = threading.Thread(target=enter)
    with pytest.warns(UserWarning, match=f"^waiting for another process that uses {tmp_path}$") as told:
        with data.lock(tmp_path):
            with pytest.raises(data.UserError, match=f"^another process uses {tmp_path}: "):
                with data.lock(tmp_path, wait=False):
                    pass
            waiting.start()
            for _ in range(1000):
                if told:
                    break
                time.sleep(0.01)
            assert not entered.is_set()
        waiting.join()
    assert entered.is_set()


def test_what_a_link_links_to_is_replaced(tmp_path):
    (tmp_path / "store").mkdir()
    target = tmp_path / "store" / "a.bin"
    target.write_bytes(b"old")
    link = tmp_path / "link.png"
    link.symlink_to(target)
    with data.atomic_write(link) as temporary:
        assert temporary.name == "link.png"
        temporary.write_bytes(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path / "store") == ["a.bin"]


@pytest.mark.parametrize("kind", ["fifo", "protected"])
def test_what_must_not_be_replaced_is_refused(tmp_path, monkeypatch, kind):
    path = tmp_path / "a.png"
    if kind == "fifo":
        os.mkfifo(path)
        why = "it is not a regular file"
    else:
        path.touch()
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may write it
        why = "it is write-protected"
    with pytest.raises(data.UserError, match=f"^can't write {path}: {why}$"):
        data.check_output(path, 10, 10)
    with pytest.raises(OSError, match=f"^can't write {path}: {why}$"):
        data.write_image(path, noise(10, 10))


# ---- Pairs ----

LAYOUTS = [("a_SRF_4_HR.png", "a_SRF_4_LR.png")]  # SelfExSR's, and then DIV2K's
LAYOUTS += [("HR/a.png", f"LR_bicubic/{name}.png") for name in ("X4/ax4", "ax4")]
LAYOUTS += [("HR/a.png", f"{lr}/{name}.bmp") for lr in ("LR", "LR_x4") for name in ("a", "ax4", "a_x4", "a_LR")]
LAYOUTS += [("DIV2K_valid_HR/a.png", "DIV2K_valid_LR_bicubic/X4/ax4.png")]
LAYOUTS += [("a.png", "LR/a.png"), ("a.png", "ax4.png"), ("a.png", None), ("HR/ax4.png", None)]


def lay_out(folder, hr, lr):
    """Write two pairs, or two HR if `lr` is None. Returns what `scoring_pairs` should."""
    pairs = []
    for letter in "ab":
        hr_path = folder / hr.replace("a.", f"{letter}.").replace("a_", f"{letter}_").replace("ax", f"{letter}x")
        lr_path = None
        save(folder, {hr_path: noise(40, 40)})
        if lr:
            head, _, name = lr.rpartition("/")
            lr_path = folder / head / name.replace("a", letter, 1)
            save(folder, {lr_path: noise(10, 10)})
        pairs.append((hr_path.stem, hr_path, lr_path))
    return pairs


@pytest.mark.parametrize("hr, lr", LAYOUTS)
def test_scoring_pairs_of_every_layout(tmp_path, hr, lr):
    pairs = lay_out(tmp_path, hr, lr)
    assert data.scoring_pairs(tmp_path) == pairs
    small, large = data.read_pair(*pairs[0][1:])
    np.testing.assert_array_equal(large, noise(40, 40))
    np.testing.assert_array_equal(small, noise(10, 10) if lr else data.degrade(noise(40, 40)))


@pytest.mark.parametrize("hr, lr", [layout for layout in LAYOUTS if layout[1]])
@pytest.mark.parametrize("missing", [1, 2])
def test_an_image_without_its_partner_is_refused(tmp_path, hr, lr, missing):
    pairs = lay_out(tmp_path, hr, lr)
    pairs[1][missing].unlink()
    partner = pairs[1][3 - missing]
    with pytest.raises(data.UserError, match=f"^{partner} has no partner: "):
        data.scoring_pairs(tmp_path)


def test_results_beside_selfexsrs_images_are_named_and_not_scored(tmp_path):
    pairs = lay_out(tmp_path, "a_SRF_4_HR.png", "a_SRF_4_LR.png")
    results = [f"{letter}_SRF_4_{name}.png" for letter in "ab" for name in ("bicubic", "nearest", "SRCNN", "A+")]
    save(tmp_path, {name: noise(40, 40) for name in results})
    with pytest.warns(UserWarning, match=f"^{tmp_path}: left out 8 .*: a_SRF_4_A+".replace("+", r"\+")):
        assert data.scoring_pairs(tmp_path) == pairs


@pytest.mark.parametrize("name", ["LR_jpeg", "lr_x4_blur", "LRbicx4", "x4_LR"])
@pytest.mark.parametrize("hr", ["HR/a.png", "a.png"])
def test_small_images_in_a_folder_of_another_name_are_refused(tmp_path, hr, name):
    lay_out(tmp_path, hr, f"{name}/a.png")
    with pytest.raises(data.UserError, match=f"^{tmp_path}/{name} has images, but another name than LR_x4: "):
        data.scoring_pairs(tmp_path)


def test_other_folders_with_images_are_named(tmp_path):
    pairs = lay_out(tmp_path, "HR/a.png", "LR_x4/a.png")
    save(tmp_path, {"LR_jpeg/a.png": noise(10, 10), "results/a.png": noise(40, 40), "b.png": noise(40, 40)})
    (tmp_path / "notes").mkdir()
    with pytest.warns(UserWarning, match=f"^{tmp_path}: left out 3 of its files and folders: LR_jpeg, b.png, results$"):
        assert data.scoring_pairs(tmp_path) == pairs


def test_what_cannot_be_scored_is_refused(tmp_path):
    save(tmp_path, {"a.png": noise(41, 43), "b.png": noise(8, 8), "c.png": noise(11, 10)})
    a, b, c = (tmp_path / f"{name}.png" for name in "abc")
    with pytest.raises(data.UserError, match=f"^{b} is too small to score: 8x8$"):
        data.read_pair(b, None)
    with pytest.raises(data.UserError, match=f"^{c} is 10x11, and a quarter of {a} is 10x10$"):
        data.read_pair(a, c)


def test_the_rest_of_a_division_by_four_is_cut_off(tmp_path):
    save(tmp_path, {"a.png": noise(41, 43)})
    lr, hr = data.read_pair(tmp_path / "a.png", None)
    np.testing.assert_array_equal(hr, noise(41, 43)[:40, :40])
    np.testing.assert_array_equal(lr, data.degrade(hr))


# ---- Prepared images ----


@pytest.mark.parametrize("train, valid", [("train/", "valid"), ("train/", "val"), ("", "validation")])
def test_images_are_prepared_once_and_again_when_changed_or_damaged(tmp_path, cache, train, valid):
    originals = {f"{train}{i}.png": noise(100 + i, 130 - i, i) for i in range(5)}
    originals[f"{valid}/a.png"] = noise(96, 96)
    photos = save(tmp_path / "photos", originals)
    images, validation = data.load(photos, cache)
    assert images.names == [f"{i}.png" for i in range(5)]
    assert validation.names == ["a.png"]
    assert len(images) == 5
    for i, (lr, hr) in enumerate(images):
        assert tuple(images.sizes[i]) == lr.shape[:2]
        assert not hr.flags.owndata  # mapped
        assert not hr.flags.writeable
        original = originals[f"{train}{i}.png"]
        np.testing.assert_array_equal(hr, original[: (100 + i) // 4 * 4, : (130 - i) // 4 * 4])
        np.testing.assert_array_equal(lr, data.degrade(np.array(hr)))

    first = stored(cache)
    save(photos, {f"{valid}/a.png": noise(96, 100)})
    _, validation = data.load(photos, cache)
    np.testing.assert_array_equal(validation[0][1], noise(96, 100))
    new = stored(cache) - first
    assert len(new) == 1  # nothing else was written
    prepared = next(cache.rglob(new.pop()[0]))
    whole = prepared.read_bytes()
    for damage in (b"", whole[:-5], whole[:50], bytes(1000)):
        prepared.unlink()
        prepared.write_bytes(damage)
        _, validation = data.load(photos, cache)
        np.testing.assert_array_equal(validation[0][1], noise(96, 100))
        assert prepared.read_bytes() == whole


def test_a_folder_trains_on_what_can_be_used_and_names_the_rest(tmp_path, cache):
    photos = save(tmp_path, {f"train/{name}": noise(120, 160) for name in ("a.png", "b.jpg")})
    save(photos, {"train/small.png": noise(96, 95), "test/c.png": noise(96, 96)})
    damaged = photos / "train" / "damaged.png"
    damaged.write_bytes((photos / "train" / "a.png").read_bytes()[:1000])
    for _ in range(2):  # prepared, and found prepared
        with pytest.warns(UserWarning) as told:
            train, valid = data.load(photos, cache)  # without valid/ one of train/ validates
        assert sorted(train.names + valid.names) == ["a.png", "b.jpg"]
        assert len(valid) == 1
        unused, one, other = (str(warning.message) for warning in told)
        assert unused == f"{photos}: left out 1 of its files and folders: test"
        assert one.startswith(f"left out: can't read {damaged}: ")
        assert other.startswith(f"left out: {photos}/train/small.png is smaller than a patch")


@pytest.mark.filterwarnings("ignore")
def test_too_few_images_are_refused(tmp_path, cache):
    photos = save(tmp_path / "photos", {"a.png": noise(96, 96), "small.png": noise(96, 95)})
    with pytest.raises(data.UserError, match=f"^{photos} needs at least 2 usable images"):
        data.load(photos, cache)
    (photos / "a.png").unlink()
    with pytest.raises(data.UserError, match=f"^{photos} has no usable images .of 1.: "):
        data.load(photos, cache)


LOAD = """
import sys
import data
sets = data.load(*sys.argv[1:])
print("ready", flush=True)
sys.stdin.readline()
for images in sets:
    print(*[f"{name[:3]}:{hr.sum()}" for name, (_, hr) in zip(images.names, images)])
"""


class Run:
    """A process that may open few files, loads images, and on `end` reads them all."""

    def __init__(self, *folders):
        argv = [sys.executable, "-c", LOAD, *folders]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=self.limit
        )
        assert self.process.stdout.readline() == "ready\n"

    def limit(self):
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))

    def end(self):
        """Returns two dicts, of the images to train on and to validate with: the sum of the pixels, by name."""
        output, _ = self.process.communicate("\n")
        assert self.process.returncode == 0
        return [dict(pair.split(":") for pair in line.split()) for line in output.splitlines()]


@pytest.fixture
def many(tmp_path):
    """400 photos, more than a process may open files."""
    return save(tmp_path / "photos", {f"{i:03}.bmp": noise(96, 96, i) for i in range(400)})


def test_no_run_loses_images_that_it_has_begun_with(many, cache):
    first = Run(many, cache)
    os.utime(many / "000.bmp", (1, 1))
    (many / "001.bmp").unlink()
    abandoned = next(cache.glob("prepared/photos-*")) / ".srgan-killed.tmp"
    abandoned.mkdir()
    Run(many, cache).end()
    assert len(stored(cache)) == 401  # one of them for either run
    assert abandoned.exists()
    train, valid = first.end()
    assert train | valid == {f"{i:03}": str(noise(96, 96, i).sum()) for i in range(400)}
    Run(many, cache).end()
    assert len(stored(cache)) == 399  # what nobody needs has gone
    assert not abandoned.exists()


def test_the_store_of_a_folder_that_is_gone_is_emptied_when_nobody_uses_it(tmp_path, cache):
    photos = {f"{i}.png": noise(96, 96, i) for i in range(3)}
    first = Run(save(tmp_path / "old", photos), cache)
    new = save(tmp_path / "new", photos)
    (tmp_path / "old").rename(tmp_path / "away")
    Run(new, cache).end()
    assert len(stored(cache)) == 6
    first.end()
    Run(new, cache).end()
    assert len(stored(cache)) == 3


def test_the_split_of_a_plain_folder_is_stable(many, cache):
    train, valid = data.load(many, cache)
    assert len(train) == 390
    assert len(valid) == 10
    assert not set(train.names) & set(valid.names)
    (many / train.names[0]).unlink()
    _, fewer = data.load(many, cache)
    assert len(set(fewer.names) - set(valid.names)) <= 1
    for path in sorted(many.iterdir())[100:]:
        path.unlink()
    assert len(data.load(many, cache)[1]) == 3  # of 100


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The folder of the program."""
    monkeypatch.setattr(data, "__file__", str(tmp_path / "program" / "data.py"))
    return tmp_path / "program"


def test_the_cache_lies_beside_the_program_or_in_the_users_folder(tmp_path, program, monkeypatch):
    photos = save(tmp_path / "photos", {f"{i}.png": noise(96, 96, i) for i in range(2)})
    program.mkdir()
    data.load(photos)
    assert len(stored(program / "data")) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(data, "__file__", "/proc/program/data.py")  # where nobody can write
    data.load(photos)
    assert len(stored(tmp_path / "home" / "srgan")) == 2


@pytest.mark.parametrize("home", ["/proc", "relative", None])
def test_a_cache_that_cannot_be_written_is_refused(tmp_path, monkeypatch, home):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "__file__", "/proc/program/data.py")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if home:
        monkeypatch.setenv("HOME", home)
    else:
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # raises KeyError, as for a user who isn't known
    with pytest.raises(data.UserError, match="^can't write to /proc/.*: choose another cache folder$"):
        data.load(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["x" * 250, "ü" * 127])
def test_a_folder_may_have_a_long_name(tmp_path, cache, name):
    photos = save(tmp_path / name, {f"{i}.png": noise(96, 96, i) for i in range(2)})
    train, _ = data.load(photos, cache)
    assert len(train) == 1


# ---- Patches ----


@pytest.fixture
def images(tmp_path, cache):
    photos = {"train/a.png": coordinates(192, 256), "train/b.png": coordinates(96, 96), "valid/a.png": noise(96, 96)}
    return data.load(save(tmp_path / "photos", photos), cache)[0]


def batches(*arguments, **keywords):
    return list(data.patches(*arguments, **keywords).as_numpy_iterator())


def same(some, others):
    """Whether two lists of batches are equal."""
    if len(some) != len(others):
        return False
    return all(np.array_equal(a, b) for one, two in zip(some, others) for a, b in zip(one, two))


@pytest.mark.parametrize("jpeg", [None, "30-95"])
def test_a_batch_depends_on_seed_and_step_alone(images, jpeg):
    whole = batches(images, 2, 0, 12, 5, jpeg)
    assert same(whole, batches(images, 2, 0, 12, 5, jpeg))
    assert same(whole[7:], batches(images, 2, 7, 12, 5, jpeg))
    for one, other in zip(whole, batches(images, 2, 0, 12, 6, jpeg)):
        assert not same([one], [other])
    for one, other in zip(whole, whole[1:]):
        assert not same([one], [other])
    assert batches(images, 1, 3, 3, 0, jpeg) == []


@pytest.mark.parametrize("jpeg, expected", [(None, "cbf1276358b67c5b"), ("30-95", "d6294476503c6ac0")])
def test_batches_are_those_of_earlier_versions(images, jpeg, expected):
    """So that a run which an earlier version has begun goes on as it would have."""
    found = hashlib.sha256()
    for lrs, hrs in batches(images, 16, 0, 3, 5, jpeg):
        found.update(lrs.tobytes() + hrs.tobytes())
    assert found.hexdigest()[:16] == expected


def test_an_epoch_visits_each_image_once_for_each_part_of_its_area(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(data, "VISIT_PIXELS", 100 * 100)
    sizes = {"a": (96, 96), "b": (200, 200), "c": (96, 320), "d": (100, 100)}
    values = {f"train/{name}.png": np.full((*size, 3), ord(name), np.uint8) for name, size in sizes.items()}
    save(tmp_path, {**values, "valid/a.png": noise(96, 96)})
    images, _ = data.load(tmp_path, cache)
    epochs = np.concatenate([hrs[:, 0, 0, 0] for _, hrs in batches(images, 3, 0, 27, seed=0)]).reshape(9, 9)
    for epoch in epochs:
        assert bytes(sorted(epoch)) == b"abbbbcccd"
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
        assert top % 4 == 0
        assert left % 4 == 0
        crops = [whole[top // 4 : top // 4 + 24, left // 4 : left // 4 + 24] for whole, _ in images]
        assert any(np.array_equal(turned(lr, way), crop) for crop in crops)
    tops, lefts, ways = zip(*places)
    for way in range(8):
        assert ways.count(way) > 10
    assert (min(tops), max(tops)) == (0, 96)
    assert (min(lefts), max(lefts)) == (0, 160)


def test_jpeg_compresses_half_of_the_lr_patches_as_if_the_whole_image_had_been_saved(images):
    file = io.BytesIO()
    Image.fromarray(images[0][0]).save(file, "JPEG", quality=30)
    saved = np.asarray(Image.open(file))
    ((clean, hrs),) = batches(images, 256, 0, 1, seed=1)
    ((lrs, same_hrs),) = batches(images, 256, 0, 1, seed=1, jpeg="30-30")
    np.testing.assert_array_equal(hrs, same_hrs)
    compressed = (lrs != clean).any(axis=(1, 2, 3))
    assert 0.4 < compressed.mean() < 0.6
    for lr, hr in zip(lrs[compressed], hrs[compressed]):
        top, left, way = found(hr)
        if top or left:  # of the large image, which ends with whole blocks
            crop = saved[top // 4 : top // 4 + 24, left // 4 : left // 4 + 24]
            np.testing.assert_array_equal(turned(lr, way)[1:-1, 1:-1], crop[1:-1, 1:-1])  # chroma blends at edges
    ((mixed, _),) = batches(images, 256, 0, 1, seed=1, jpeg="30-95")
    worst = np.abs(lrs[compressed].astype(int) - clean[compressed]).mean()
    error = np.abs(mixed[compressed].astype(int) - clean[compressed]).mean()
    assert 0 < error < worst * 0.9


# ---- DIV2K ----


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        how = self.server.behaviour.pop(0) if self.server.behaviour else "well"
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.server.requests.append((self.path, start))
        body = self.server.files[self.path.lstrip("/")]
        if how == "wrong":
            body = bytes(len(body))
        if how == "ignores Range":
            start = 0
        self.send_response({"ignores Range": 200, "404": 404}.get(how, 206))
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = (start + len(body)) // 2 if how == "cuts" else len(body)
        self.wfile.write(body[start:end])


@pytest.fixture
def server(monkeypatch):
    """A tiny DIV2K: three images to train on, one to validate with. `behaviour` lists what the next requests get."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.behaviour = []
    server.requests = []
    server.files = {}
    for name, numbers in {"DIV2K_train_HR": (1, 2, 3), "DIV2K_valid_HR": (4,)}.items():
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for number in numbers:
                image = io.BytesIO()
                Image.fromarray(noise(96, 100, number)).save(image, "PNG")
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


CASES = [  # what the first two requests get, and what the first says
    ("cuts", "well", "can't download .*DIV2K_train_HR.zip .the connection ended early.: run the command again"),
    (
        "cuts",
        "ignores Range",
        "can't download .*DIV2K_train_HR.zip .the connection ended early.: run the command again",
    ),
    ("404", "well", "can't download .*DIV2K_train_HR.zip .HTTP Error 404"),
    (
        "wrong",
        "well",
        ".*DIV2K_train_HR.zip.part was not the published archive, and has been removed: run the same command",
    ),
]


@pytest.mark.parametrize("first, second, line", CASES)
def test_div2k_is_downloaded_once_continued_and_verified(server, cache, first, second, line):
    server.behaviour[:] = [first, second]
    with pytest.raises(OSError, match=f"^{line}[^\n]*$"):
        data.load(cache_dir=cache)
    given = cache / "DIV2K" / "DIV2K_valid_HR.zip"
    given.write_bytes(server.files["DIV2K_valid_HR.zip"])  # put there by the user
    for _ in range(2):
        train, valid = data.load(cache_dir=cache)
        assert train.names == ["0001.png", "0002.png", "0003.png"]
        assert valid.names == ["0004.png"]
        np.testing.assert_array_equal(train[2][1], noise(96, 100, 3))
    assert list(cache.rglob("*.zip*")) == [given]
    assert [start > 0 for _, start in server.requests] == [False, first == "cuts"]


def test_a_wrong_archive_that_the_user_put_there_is_left_to_the_user(server, cache):
    given = cache / "DIV2K" / "DIV2K_train_HR.zip"
    given.parent.mkdir(parents=True)
    given.write_bytes(b"another")
    with pytest.raises(data.UserError, match=f"^{given} is not the published archive: remove it, and run "):
        data.load(cache_dir=cache)
    assert given.read_bytes() == b"another"
