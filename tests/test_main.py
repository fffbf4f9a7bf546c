"""The command line as users type it."""

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

import data
import main

PROGRAM = Path(main.__file__).resolve()
WEIGHTS = str(main.WEIGHTS / "srgan.weights.h5")


@pytest.fixture(autouse=True)
def restored(monkeypatch, tmp_path):
    """What `main.main` changes in the process is restored, and what training keeps goes to a temporary folder."""
    monkeypatch.setattr(data, "FOLDER", tmp_path / "data")
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def run(*argv):
    return main.main([str(word) for word in argv])


def test_help_needs_no_package_and_shows_the_known_flags_first():
    done = subprocess.run([sys.executable, "-S", PROGRAM, "-h"], capture_output=True, text=True, check=True)  # no site
    flags = re.findall(r"^  (--\w+)", done.stdout, re.MULTILINE)
    assert flags[:6] == ["--STEPS", "--PREGENSTEPS", "--BATCH_SIZE", "--lr_pre_gen", "--lr_gen", "--pretrained"]
    text = " ".join(done.stdout.split())
    for flag, default in (("STEPS", 2000), ("PREGENSTEPS", 2000), ("BATCH_SIZE", 128), ("lr_gen", 0.0001)):
        assert re.search(rf" --{flag} [A-Z]+ (?:(?! --\w).)*\(default: {default}\)", text), flag


@pytest.mark.parametrize(
    "argv, code, message",
    [
        ("--weights nowhere.weights.h5", 2, "no such weights file: nowhere.weights.h5"),
        ("", 2, "run pip install -r requirements.txt"),
    ],
)
def test_without_the_packages_there_is_one_clear_line(argv, code, message):
    done = subprocess.run(
        [sys.executable, "-S", PROGRAM, "--pretrained", *argv.split()], capture_output=True, text=True
    )
    assert done.returncode == code and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--STEPS -1", "--STEPS: must be a whole number from 0 to 9999999, not -1"),
        ("--STEPS 1.5", "--STEPS: must be a whole number from 0 to 9999999, not 1.5"),
        ("--STEPS 9223372036854775808", "--STEPS"),
        ("--PREGENSTEPS x", "--PREGENSTEPS"),
        ("--BATCH_SIZE 0", "--BATCH_SIZE"),
        ("--BATCH_SIZE 99999999999999999999999", "--BATCH_SIZE"),
        ("--lr_pre_gen 0", "--lr_pre_gen"),
        ("--lr_gen nan", "--lr_gen"),
        ("--lr_gen inf", "--lr_gen"),
        ("--STEPS 0 --PREGENSTEPS 0", "nothing to train"),
        ("--PREGENSTEPS 0 --run_dir nowhere", "--PREGENSTEPS above 0"),
        ("--pretrained --blend 1.5", "--blend"),
        ("--ema 1", "--ema"),
        ("--jpeg 90-80", "--jpeg: must be two qualities from 1 to 100, as in 70-95, not 90-80"),
        ("--jpeg 0-80", "--jpeg"),
        ("--jpeg 70-", "--jpeg"),
        ("--vgg_layer block9_conv9", "--vgg_layer"),
        ("--vgg_weights nowhere.h5", "nowhere.h5"),
        ("--precision float64", "--precision"),
        ("--save_every 0", "--save_every"),
        ("--seed -1", "--seed"),
        ("--data_dir nowhere", "nowhere"),
        ("--weights nowhere.weights.h5", "nowhere.weights.h5"),
        ("--weights .", "no such weights file"),
        ("--input a.png", "--input needs --pretrained"),
        ("--output=a.png", "--output needs --pretrained"),
        ("--json a.json", "--json needs --evaluate"),
        ("--ensemble", "--ensemble needs --pretrained or --evaluate"),
        ("--pretrained --STEPS 5 --jpeg 70-95", "--STEPS can't be used with --pretrained"),
        ("--evaluate . --run_dir x", "--run_dir can't be used with --evaluate"),
        ("--evaluate . --input a.png", "--input can't be used with --evaluate"),
        ("--export x --precision bfloat16", "--precision can't be used with --export"),
        ("--pretrained --evaluate tests", "different tasks"),
        ("--evaluate nowhere", "nowhere"),
        ("--evaluate=", "--evaluate is empty"),
        ("--weights=", "--weights is empty"),
        ("--run_dir=", "--run_dir is empty"),
        ("--pretrained --input=", "--input is empty"),
        ("--nonsense", "--nonsense"),
    ],
)
def test_wrong_flag_is_one_line_and_exit_code_2(argv, message, capsys):
    try:
        code = run(*argv.split())
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1


def test_args_are_what_the_user_typed():
    args = main.parse("--STEPS 3 --BATCH_SIZE 5 --lr_pre_gen 1e-3 --jpeg 75-90 --ema 0.9 --data_dir ./photos".split())
    assert (args.STEPS, args.BATCH_SIZE, args.lr_pre_gen, args.ema, args.data_dir) == (3, 5, 1e-3, 0.9, "./photos")
    assert args.jpeg == "75-90" and main.parse(["--jpeg=80"]).jpeg == "80-80"
    assert (args.PREGENSTEPS, args.weights, args.pretrained) == (2000, None, False)


# ----------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def checked(monkeypatch):
    """`checked(*argv)`: whether a training with these flags passes all checks; it ends there."""

    class Passed(Exception):
        pass

    def start():
        raise Passed

    def checked(*argv):
        try:
            assert run(*argv) == 2
        except Passed:
            return True
        return False

    monkeypatch.setattr(main, "start_tensorflow", start)
    return checked


@pytest.mark.parametrize("name", ["srresnet.weights.h5", "srgan.weights.h5"])
def test_a_folder_in_place_of_the_results_is_refused(checked, tmp_path, capsys, name):
    (tmp_path / name).mkdir()
    assert not checked("--run_dir", tmp_path)
    assert f"{tmp_path / name}: it is a folder" in capsys.readouterr().err


def test_a_run_folder_that_cannot_be_made_is_refused(checked, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert not checked("--run_dir", tmp_path / "file" / "run")
    assert "not a folder" in capsys.readouterr().err


def test_a_run_folder_that_tensorflow_would_take_for_a_pattern_is_refused(checked, capsys):
    assert not checked("--run_dir", "runs[1]")
    assert "as a pattern" in capsys.readouterr().err


@pytest.fixture
def resumed(tmp_path, monkeypatch):
    """Flags of a run that was interrupted in its pre-training, and its folder, with names that aren't its own."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    flags = ["--run_dir", "run", "--data_dir", "photos", "--jpeg", "70-95"]
    for name in ("pretrain-0000005", "pretrain-x1", "gan-", ".DS_Store"):
        Path("run", "checkpoints", name).mkdir(parents=True)
    Path("run", "options.json").write_text(json.dumps(vars(main.parse(flags))))
    return flags, Path("run")


def test_what_may_change_when_a_run_is_resumed(checked, resumed, capsys):
    flags, run_dir = resumed
    later = ["--lr_gen", 1e-5, "--STEPS", 9000, "--data_dir", "./photos"]
    assert checked(*flags) and checked(*flags, *later)
    assert checked(*flags, "--vgg_layer", "block2_conv2", "--PREGENSTEPS", 9)
    for more, message in (
        (["--BATCH_SIZE", 8], "was started with --BATCH_SIZE 128, not with --BATCH_SIZE 8"),
        (["--jpeg", "70-90"], "was started with --jpeg 70-95, not with --jpeg 70-90"),
        (["--weights", WEIGHTS], "was started without --weights, not with --weights"),
    ):
        assert not checked(*flags, *more)
        assert message in capsys.readouterr().err
    (run_dir / "checkpoints" / "gan-0000005").mkdir()
    assert checked(*flags) and not checked(*flags, "--vgg_layer", "block2_conv2")


@pytest.mark.parametrize("text", ["", "[]", "3", '"text"', "[[1, 2]]", '{"seed": {}, "data_dir": 5}', "\0"])
def test_options_that_are_not_a_run_s_are_one_line(checked, resumed, capsys, text):
    flags, run_dir = resumed
    (run_dir / "options.json").write_text(text)
    assert not checked(*flags)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("what", ["empty", "no_image", "small"])
def test_data_that_cannot_be_used_is_one_line(tmp_path, capsys, what):
    folder = tmp_path / "photos"
    folder.mkdir()
    if what == "no_image":
        (folder / "a.png").write_text("text")
    if what == "small":
        Image.fromarray(np.zeros((95, 200, 3), np.uint8)).save(folder / "a.png")
    assert run("--data_dir", folder, "--STEPS", 0, "--run_dir", tmp_path / "run") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("main.py: ") and "no usable" in error


# ------------------------------------------------------------------------------------------------ signals and streams


def test_sigterm_removes_what_is_half_written(tmp_path, monkeypatch):
    def half(network, file, *args, **kwargs):
        Path(file).write_text("half")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(keras.Model, "export", half)
    with pytest.raises(SystemExit) as stop:
        run("--export", tmp_path / "a.tflite")
    assert stop.value.code == 143 and not list(tmp_path.iterdir())


def test_ctrl_c_is_exit_code_130(tmp_path, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "start_tensorflow", interrupted)
    assert run("--run_dir", tmp_path / "run") == 130


def test_a_warning_is_one_line_from_the_start(monkeypatch, capsys):
    def warn(args):
        warnings.warn("Metadata Warning, tag 296 had too many entries:\n2, expected 1")
        raise ValueError("no weights")

    monkeypatch.setattr(main, "find_weights", warn)
    assert run("--pretrained") == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning == "Warning: Metadata Warning, tag 296 had too many entries: 2, expected 1"
    assert error == "main.py: no weights"


def test_printing_never_ends_the_work(tmp_path):
    """A name that the terminal can't show, an output that nobody reads any more, errors that go nowhere."""
    Image.new("RGB", (9, 8)).save(tmp_path / "ü.png")
    Image.new("RGB", (9, 8)).save(tmp_path / "z.png")
    (tmp_path / "ö.png").write_text("bad")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        ["sh", "-c", '"$0" "$@" 2>&-', sys.executable, PROGRAM, "--pretrained", "--input", ".", "--output", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
        stdout=writer,
    )
    os.close(writer)
    assert done.returncode == 1  # for the bad image
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["z.png", "ü.png"]
