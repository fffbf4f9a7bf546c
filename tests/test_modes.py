"""Upscaling files and folders, and scoring."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import make_image, refusal, run
from PIL import Image
from test_upscale import weights  # noqa: F401, a fixture

import data
import losses
import main
import model


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A current folder with an image, links to it, and what is in the way."""
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "empty", "links", "out"):
        Path(folder).mkdir()
    for name in ("a.png", "folder/a.png", "out/b.png", "links/b.png"):
        Image.new("RGB", (30, 20)).save(name)
    Image.new("L", (16_400, 1)).save("long.png")
    os.mkfifo("fifo.jpg")
    os.symlink("a.png", "link.png")
    os.symlink("../out/b.png", "links/a.png")
    for name in ("bad.png", "text.txt"):
        Path(name).write_text("text")


@pytest.fixture
def photos_to_upscale(tmp_path):
    """A folder with five images of 20x30."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(make_image(i, 20, 30)).save(folder / f"{i}.png")
    return folder


def quick(lr):
    """In place of an upscaler."""
    return lr.repeat(4, axis=0).repeat(4, axis=1)


@pytest.fixture
def quickly(monkeypatch):
    """The program upscales without a network."""
    monkeypatch.setattr(main, "load_generator", lambda args: None)
    monkeypatch.setattr(model, "Upscaler", lambda network, ensemble: quick)


# ---- Refusals ----


@pytest.mark.parametrize(
    "flags, line",
    [
        ("a.png --output a.png", "--output a.png is also an input, and inputs are never overwritten"),
        ("a.png --output folder/../a.png", "--output folder/../a.png is also an input"),
        ("a.png --output ./", "--output a.png is also an input"),
        ("link.png --output a.png", "--output a.png is also an input"),
        ("a.png --output link.png", "--output link.png is also an input"),
        ("folder --output folder", "--output folder/a.png is also an input"),
        ("links --output out", "--output out/b.png is also an input"),
        ("a.png --output b.xyz", "can't write b.xyz: the name of an image ends in one of "),
        ("a.png --output b", "can't write b: the name of an image ends in one of "),
        ("a.png --output b.png --format png", "--format is for results in a folder: --output b.png has its format"),
        ("folder --output out --format heic", "--format heic is not one of "),
        ("empty --output out", "no images in empty: supported are "),
        ("long.png --output b.jpg", "can't write b.jpg: 65600x4 is more than a JPEG holds, choose .png"),
        ("text.txt --output b.png", "can't read text.txt: "),
        ("folder --output text.txt", "--input folder is a folder: --output must be a folder, too, not text.txt"),
        ("folder", "--input folder is a folder: --output must be a folder, too, not output.jpg"),
        ("folder --output b.png", "--input folder is a folder: --output must be a folder, too, not b.png"),
        ("a.png --output text.txt/", "text.txt: File exists"),
        ("folder --output text.txt/out", "text.txt/out: Not a directory"),
        ("bad.png --output b.png", "can't read bad.png: "),
        ("fifo.jpg --output b.png", "can't read fifo.jpg: it is not a regular file"),
        ("nowhere.png", "no such file or folder: nowhere.png"),
    ],
)
def test_refused_before_any_work(places, capsys, flags, line):
    before = sorted(os.listdir("."))
    assert refusal(capsys, "--pretrained", "--input", *flags.split()).startswith(f"main.py: {line}")
    assert sorted(os.listdir(".")) == before


@pytest.mark.parametrize("folder, line", [("text.txt", "text.txt: Not a directory"), ("empty", "no images in empty")])
def test_evaluation_refused_before_any_work(places, capsys, folder, line):
    assert refusal(capsys, "--evaluate", folder).startswith(f"main.py: {line}")


def test_a_read_only_folder_is_refused(places, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write everywhere
    line = refusal(capsys, "--pretrained", "--input", "a.png", "--output", "b.png")
    assert line == "main.py: can't write b.png: . is read-only\n"


def test_two_images_that_would_become_one_are_refused(places, capsys):
    Image.new("RGB", (9, 9)).save("folder/a.jpg")
    line = refusal(capsys, "--pretrained", "--input", "folder", "--output", "new", "--format", "png")
    assert line == "main.py: folder/a.jpg and folder/a.png would both become new/a.png\n"


def test_two_results_that_are_one_file_by_a_link_are_refused(places, capsys):
    Image.new("RGB", (9, 9)).save("folder/b.png")
    os.symlink("b.png", "out/a.png")
    line = refusal(capsys, "--pretrained", "--input", "folder", "--output", "out")
    assert line == "main.py: folder/a.png and folder/b.png would both become out/b.png\n"


def test_weights_that_dont_do(places, weights, capsys):  # noqa: F811
    argv = ["--pretrained", "--input", "a.png", "--output", "b.png", "--weights"]
    line = refusal(capsys, *argv, "text.txt", started=True)
    assert line == "main.py: text.txt doesn't hold weights of the generator\n"
    srresnet = weights.with_name("srresnet.weights.h5")
    line = refusal(capsys, *argv, srresnet, "--blend", 0, started=True)
    assert line.startswith(f"main.py: --blend mixes {srresnet} with SRGAN's weights")
    assert not Path("b.png").exists()


def test_too_little_memory_is_one_line(places, weights, capsys, monkeypatch):  # noqa: F811
    def exhausted(upscaler, lr):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    monkeypatch.setattr(model.Upscaler, "upscale", exhausted)
    argv = ["--pretrained", "--input", "a.png", "--output", "b.png", "--weights", weights]
    assert refusal(capsys, *argv, started=True).startswith("main.py: out of memory")
    assert not Path("b.png").exists()


# ---- Upscaling ----


def test_one_image_into_a_folder(places, quickly):
    for output in ("new/", "empty"):
        assert run("--pretrained", "--input", "a.png", "--output", output) == 0
        assert Image.open(Path(output) / "a.png").size == (120, 80)


def test_blend_uses_the_released_srresnet_if_there_is_none_beside(places, weights, capsys, monkeypatch):  # noqa: F811
    srresnet = weights.with_name("srresnet.weights.h5")
    argv = ["--pretrained", "--input", "a.png", "--output", "b.png", "--weights", weights, "--blend", 0.5]
    assert run(*argv) == 0
    assert f"Mixing {weights} with {srresnet}" in capsys.readouterr().out
    released = Path("released")
    released.mkdir()
    srresnet = srresnet.rename(released / srresnet.name)
    monkeypatch.setattr(main, "WEIGHTS", released / "srgan.weights.h5")
    assert run(*argv) == 0
    assert f"Mixing {weights} with {srresnet}" in capsys.readouterr().out


def test_transparency_through_the_command_line(tmp_path, weights):  # noqa: F811
    """The colours of transparent pixels are invisible, and don't bleed into visible ones."""
    image = np.zeros((24, 32, 4), np.uint8)
    image[:, :16] = (200, 100, 50, 255)
    image[:, 16:] = (0, 255, 0, 0)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert run("--pretrained", "--input", tmp_path / "a.png", "--output", tmp_path / "b.png", "--weights", weights) == 0
    with Image.open(tmp_path / "b.png") as result:
        assert result.mode == "RGBA"
        pixels = np.asarray(result)
    assert pixels.shape == (96, 128, 4)
    assert pixels[:, :60, 3].min() == 255
    assert pixels[:, 68:, 3].max() == 0
    visible = pixels[8:-8, 8:64, :3].astype(int)  # without the image's edge
    assert np.abs(visible - (200, 100, 50)).max() < 5


def test_a_folder_of_images_of_which_some_fail(tmp_path, weights, capsys):  # noqa: F811
    source = tmp_path / "in"
    target = tmp_path / "new" / "out"
    source.mkdir()
    image = make_image(2, 30, 20)
    for kind in ("png", "jpg", "jfif", "webp", "bmp", "tif"):
        Image.fromarray(image).save(source / f"a.{kind}")
    (source / "bad.png").write_bytes(b"not an image")
    assert run("--pretrained", "--input", source, "--output", target, "--weights", weights) == 1
    printed = capsys.readouterr()
    bad, summary = printed.err.splitlines()
    assert bad.startswith(f"main.py: can't read {source / 'bad.png'}: ")
    assert summary == "main.py: 1 of 7 images failed"
    names = sorted(path.name for path in source.glob("a.*"))
    assert printed.out.splitlines()[1:] == [f"{target / name}: 120x80" for name in names]  # in order
    assert sorted(os.listdir(target)) == names
    for path in target.iterdir():
        score = losses.psnr(data.read_rgb(path), data.bicubic(image))
        assert score > (35 if path.suffix in (".png", ".bmp", ".tif") else 20)


def test_a_folder_into_another_format(photos_to_upscale, quickly):
    target = photos_to_upscale.with_name("out")
    assert run("--pretrained", "--input", photos_to_upscale, "--output", target, "--format", "JPG") == 0
    assert sorted(os.listdir(target)) == [f"{i}.jpg" for i in range(5)]
    assert Image.open(target / "0.jpg").format == "JPEG"


def test_skip_existing_skips_what_is_whole_and_newer(photos_to_upscale, quickly, tmp_path, capsys):
    target = photos_to_upscale.with_name("out")
    file = tmp_path / "weights"
    file.touch()
    argv = ["--pretrained", "--input", photos_to_upscale, "--output", target, "--weights", file]
    assert run(*argv) == 0
    whole = (target / "0.png").read_bytes()

    (target / "0.png").write_bytes(whole[: len(whole) // 2])
    (target / "1.png").write_bytes(b"")
    Image.new("RGB", (9, 9)).save(target / "2.png")
    os.utime(photos_to_upscale / "3.png", (2e9, 2e9))
    before = (target / "4.png").stat().st_mtime_ns
    capsys.readouterr()
    assert run(*argv, "--skip_existing") == 0
    assert "1 of 5 images skipped" in capsys.readouterr().out
    assert (target / "0.png").read_bytes() == whole
    for i in range(5):
        assert Image.open(target / f"{i}.png").size == (80, 120)
    assert (target / "4.png").stat().st_mtime_ns == before

    os.utime(photos_to_upscale / "3.png", (1e9, 1e9))
    assert run(*argv, "--skip_existing") == 0
    assert "5 of 5 images skipped" in capsys.readouterr().out
    os.utime(file, (2e9, 2e9))
    assert run(*argv, "--skip_existing") == 0
    assert "0 of 5 images skipped" in capsys.readouterr().out


# ---- Files beside the network ----


def jobs_in(folder):
    return [main.Job(path, folder.with_name("out") / path.name) for path in sorted(folder.iterdir())]


def test_the_next_image_is_read_and_results_are_written_while_the_network_works(photos_to_upscale, monkeypatch):
    upscaling = threading.Event()
    read, written = [], []

    def upscaler(lr):
        upscaling.set()
        deadline = time.monotonic() + 10
        while len(read) < min(upscaler.calls + 2, 5) or len(written) < upscaler.calls:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert len(read) <= upscaler.calls + 2  # one image ahead
        upscaler.calls += 1
        return quick(lr)

    upscaler.calls = 0
    read_image, write_image = data.read_image, data.write_image
    monkeypatch.setattr(data, "read_image", lambda path: read.append(path) or read_image(path))
    monkeypatch.setattr(data, "write_image", lambda path, *rest: write_image(path, *rest) or written.append(path))
    assert main.upscale_all(jobs_in(photos_to_upscale), upscaler) == 0
    assert len(written) == 5


def test_results_that_wait_to_be_written_hold_a_bounded_amount_of_memory(photos_to_upscale, monkeypatch):
    one = 16 * 20 * 30 * 3
    held = []
    lock = threading.Lock()
    most = 0
    write_image = data.write_image

    def upscaler(lr):
        nonlocal most
        with lock:
            held.append(1)
            most = max(most, len(held))
        return quick(lr)

    def slowly(*arguments):
        time.sleep(0.05)
        write_image(*arguments)
        with lock:
            held.pop()

    monkeypatch.setattr(data, "write_image", slowly)
    for limit, expected in ((10 * one, 5), (2 * one, 2), (one // 2, 1)):
        most = 0
        monkeypatch.setattr(main, "RESULTS_IN_MEMORY", limit)
        assert main.upscale_all(jobs_in(photos_to_upscale), upscaler) == 0
        assert most <= expected
        assert most >= min(expected, 2)


def test_messages_come_in_the_order_of_the_files(photos_to_upscale, monkeypatch, capsys):
    read_image, write_image = data.read_image, data.write_image

    def warn_of_2(path):
        if path.stem == "2":
            main.warnings.warn(f"{path.name} is odd")
        return read_image(path)

    def slow_0_no_3(path, *rest):
        if path.stem == "0":
            time.sleep(0.2)
        if path.stem == "3":
            raise OSError(f"can't write {path.name}: no reason")
        write_image(path, *rest)

    monkeypatch.setattr(main.warnings, "showwarning", main.show_warning)
    monkeypatch.setattr(data, "read_image", warn_of_2)
    monkeypatch.setattr(data, "write_image", slow_0_no_3)
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    assert main.upscale_all(jobs_in(photos_to_upscale), quick) == 1
    out = photos_to_upscale.with_name("out")
    assert capsys.readouterr().out.splitlines() == [
        f"{out}/0.png: 80x120",
        f"{out}/1.png: 80x120",
        "Warning: 2.png is odd",
        f"{out}/2.png: 80x120",
        "main.py: can't write 3.png: no reason",
        f"{out}/4.png: 80x120",
    ]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_leaves_whole_files_only(photos_to_upscale, quickly, monkeypatch, number, code):
    """One file is being written by another thread, others wait for it."""
    begun = []
    write_image = data.write_image

    def slowly(*arguments):
        if not begun:
            begun.append(True)
            time.sleep(0.1)
            os.kill(os.getpid(), number)
        time.sleep(0.3)
        write_image(*arguments)

    monkeypatch.setattr(data, "write_image", slowly)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    out = photos_to_upscale.with_name("out")
    try:
        result = run("--pretrained", "--input", photos_to_upscale, "--output", out)
    except SystemExit as stop:
        result = stop.code
    assert result == code
    left = sorted(os.listdir(out))
    assert 1 <= len(left) < 5
    for name in left:
        assert Image.open(out / name).size == (80, 120)
    time.sleep(0.5)
    assert sorted(os.listdir(out)) == left  # no thread goes on


def test_a_bug_in_a_thread_shows_its_traceback(photos_to_upscale, monkeypatch):
    monkeypatch.setattr(data, "write_image", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main.upscale_all(jobs_in(photos_to_upscale), quick)


# ---- Scores ----


def scores(capsys, *argv):
    """{name: [bicubic's PSNR and SSIM, the model's PSNR and SSIM]} of what --evaluate prints."""
    assert run("--evaluate", *argv) == 0
    return table(capsys.readouterr().out)


def table(printed):
    rows = [line.rsplit(maxsplit=4) for line in printed.splitlines() if re.search(r"\d\.\d{4}$", line)]
    return {row[0].strip(): list(map(float, row[1:])) for row in rows}


def test_scores_are_those_of_the_upscaled_files(tmp_path, weights, capsys):  # noqa: F811
    hr_folder, lr_folder, sr_folder = (tmp_path / name for name in ("HR", "LR_x4", "sr"))
    hr_folder.mkdir()
    lr_folder.mkdir()
    for name, channels in (("0", 3), ("1", 1)):  # the second has one channel
        hr = make_image(int(name), 96, 80)[..., :channels]
        lr = data.degrade(np.broadcast_to(hr, (80, 96, 3)))[..., :channels]
        Image.fromarray(hr.squeeze()).save(hr_folder / f"{name}.png")
        Image.fromarray(lr.squeeze()).save(lr_folder / f"{name}x4.png")
    found = scores(capsys, tmp_path, "--weights", weights)
    assert found == scores(capsys, hr_folder, "--weights", weights)

    assert run("--pretrained", "--input", lr_folder, "--output", sr_folder, "--weights", weights) == 0
    expected = {}
    for name in "01":
        hr = data.read_image(hr_folder / f"{name}.png")[0]
        bicubic = data.bicubic(data.read_rgb(lr_folder / f"{name}x4.png"))[..., : hr.shape[2]]
        sr = data.read_image(sr_folder / f"{name}x4.png")[0]
        expected[name] = [score(image, hr) for image in (bicubic, sr) for score in (losses.psnr, losses.ssim)]
    expected["mean of 2"] = np.mean([*expected.values()], axis=0)
    assert found == {name: pytest.approx(values, abs=0.0051) for name, values in expected.items()}


def test_a_bad_pair_doesnt_lose_the_mean_of_the_others(tmp_path, weights, capsys):  # noqa: F811
    for i in range(3):
        Image.fromarray(make_image(i, 96, 80)).save(tmp_path / f"{i}.png")
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[:99])
    assert run("--evaluate", tmp_path, "--weights", weights) == 1
    printed = capsys.readouterr()
    found = table(printed.out)
    assert list(found) == ["0", "2", "mean of 2"]
    assert found["mean of 2"] == pytest.approx(np.mean([found["0"], found["2"]], axis=0), abs=0.01)
    bad, summary = printed.err.splitlines()
    assert bad.startswith(f"main.py: can't read {tmp_path / '1.png'}: ")
    assert summary == "main.py: 1 of 3 images failed"


# ---- Large images ----


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_100_megapixels_in_bounded_memory(tmp_path, mode):
    Image.fromarray(make_image(0, 500, 500)).resize((2500, 2500)).convert(mode).save(tmp_path / "a.png")
    code = "import main, sys; from benchmark import peak_memory; print(main.main(sys.argv[1:]), peak_memory())"
    argv = [sys.executable, "-c", code, "--pretrained", "--input", "a.png", "--output", "b.png"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2]))}
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    code, peak = done.stdout.split()[-2:]
    assert code == "0", done.stderr
    assert float(peak) < 2500  # MB
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(tmp_path / "b.png") as image:
        assert image.size == (10_000, 10_000)
        assert image.mode == mode
