"""The command line: flags, messages, exit codes and odd surroundings."""

import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import pytest
import tiny
from conftest import refusal, run
from PIL import Image

import main
import model

PROGRAM = Path(main.__file__).resolve()


def process(*argv, **options):
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, **options)


# ---- Flags ----


def test_help_needs_no_package_and_shows_the_known_flags_first():
    done = process("-S", PROGRAM, "-h", check=True)  # -S: without packages
    flags = re.findall(r"^  (--\w+)", done.stdout, re.MULTILINE)
    assert flags[:6] == ["--STEPS", "--PREGENSTEPS", "--BATCH_SIZE", "--lr_pre_gen", "--lr_gen", "--pretrained"]
    for default in (2000, 128, 0.0001, "paper"):
        assert f"(default: {default})" in done.stdout


def test_a_refusal_comes_before_tensorflow_and_is_exit_code_2():
    done = process("-X", "importtime", PROGRAM, "--pretrained", "--input", "nowhere.png")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "main.py: no such file or folder: nowhere.png"
    assert "tensorflow" not in done.stderr


def test_a_missing_package_is_one_line():
    done = process("-S", PROGRAM, "--pretrained")
    assert done.returncode == 2
    line = r"main.py: No module named '\w+': activate the environment, or run pip install -r requirements.txt\n"
    assert re.fullmatch(line, done.stderr)


@pytest.mark.parametrize("error, line", [(OSError("no\nfile"), "no file"), (MemoryError(), "out of memory")])
def test_what_a_user_can_mend_is_one_line_and_a_bug_is_a_traceback(monkeypatch, capsys, error, line):
    def fail():
        warnings.warn("tag 296 had\ntoo many entries")
        raise error

    monkeypatch.setattr(model, "generator", fail)
    argv = "--pretrained", "--input", PROGRAM.with_name("input.jpg")
    assert run(*argv) == 1
    assert capsys.readouterr().err.splitlines() == ["Warning: tag 296 had too many entries", f"main.py: {line}"]
    error = KeyboardInterrupt()
    assert run(*argv) == 130
    monkeypatch.setattr(model, "generator", lambda: keras.layers.Dense(-1))
    with pytest.raises(ValueError):
        run(*argv)


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--STEPS -1", "argument --STEPS: must be a whole number from 0 to 9999999, not -1"),
        ("--STEPS 1.5", "argument --STEPS: must be a whole number"),
        ("--STEPS 9223372036854775808", "argument --STEPS: must be a whole number"),
        ("--PREGENSTEPS x", "argument --PREGENSTEPS: must be a whole number"),
        ("--BATCH_SIZE 0", "argument --BATCH_SIZE: must be a whole number from 1"),
        ("--lr_pre_gen 0", "argument --lr_pre_gen: must be a number from 1e-12 to 1, not 0"),
        ("--lr_gen nan", "argument --lr_gen: must be a number"),
        ("--lr_gen inf", "argument --lr_gen: must be a number"),
        ("--adversarial -1", "argument --adversarial: must be a number"),
        ("--recipe none", "argument --recipe: invalid choice: 'none'"),
        ("--ema 1", "argument --ema: must be a number"),
        ("--jpeg 90-80", "argument --jpeg: must be one or two qualities from 1 to 100, as in 70-95, not 90-80"),
        ("--jpeg 0-80", "argument --jpeg: must be"),
        ("--jpeg 70-", "argument --jpeg: must be"),
        ("--jpeg -", "argument --jpeg:"),
        ("--precision float64", "argument --precision: invalid choice"),
        ("--vgg_layer block9_conv9", "argument --vgg_layer: invalid choice"),
        ("--save_every 0", "argument --save_every: must be a whole number from 1"),
        ("--seed -1", "argument --seed: must be a whole number"),
        ("--blend 1.5", "argument --blend: must be a number from 0 to 1, not 1.5"),
        ("--run_dir runs[1]", "--run_dir runs[1]: TensorFlow reads [ and \\ as a pattern"),
        ("--run_dir r\udcff", "--run_dir 'r\\udcff' has characters that can't be printed"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("--pretrain", "unrecognized arguments: --pretrain"),
        ("--input=", "--input is empty"),
        ("--pretrained --evaluate tests", "argument --evaluate: not allowed with argument --pretrained"),
        ("--STEPS 0 --PREGENSTEPS 0", "--STEPS 0 --PREGENSTEPS 0: nothing to train"),
        ("--data_dir nowhere", "no such file or folder: nowhere"),
        ("--vgg_weights nowhere", "no such file or folder: nowhere"),
        ("--weights nowhere", "no such file or folder: nowhere"),
        ("--evaluate nowhere", "no such file or folder: nowhere"),
        (f"--data_dir {'a' * 300}", "no such file or folder: aaa"),
        ("--PREGENSTEPS 0 --run_dir nowhere", "--PREGENSTEPS 0 needs --weights, or nowhere/srresnet.weights.h5"),
    ],
)
def test_wrong_flags_and_missing_files_are_one_line(flags, line, capsys):
    assert refusal(capsys, *flags.split()).startswith(f"main.py: {line}")


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--ensemble", "--ensemble needs --pretrained or --evaluate"),
        ("--skip_existing", "--skip_existing needs --pretrained"),
        ("--blend 0.5", "--blend needs --pretrained or --evaluate or --export"),
        ("--output a.png", "--output needs --pretrained"),
        ("--format png", "--format needs --pretrained"),
        ("--pretrained --jpeg 75", "--jpeg can't be used with --pretrained"),
        ("--pretrained --STEPS 2000", "--STEPS can't be used with --pretrained"),
        ("--pretrained --seed 0", "--seed can't be used with --pretrained"),
        ("--evaluate tests --jpeg 75", "--jpeg can't be used with --evaluate"),
        ("--evaluate tests --input a.png", "--input can't be used with --evaluate"),
        ("--export a --ensemble", "--ensemble can't be used with --export"),
        ("--export a --precision bfloat16", "--precision can't be used with --export"),
    ],
)
def test_flags_that_do_nothing_in_a_mode_are_refused(flags, line, capsys):
    assert refusal(capsys, *flags.split()) == f"main.py: {line}\n"


def test_the_default_is_the_paper_and_a_flag_beside_a_recipe_wins():
    paper = main.parse([])
    assert (paper.vgg_layer, paper.adversarial, paper.lr_decay) == ("block5_conv4", 1e-3, "paper")
    assert (paper.colour, paper.penalty, paper.ema, paper.jpeg) == (0, 0, 0, None)
    release = main.parse(["--recipe", "release"])
    assert release.vgg_layer == "block3_conv4"
    assert release.jpeg == "60-95"
    mixed = main.parse("--ema 0 --colour 5 --recipe release --vgg_layer block5_conv4".split())
    assert (mixed.ema, mixed.colour, mixed.vgg_layer) == (0, 5, "block5_conv4")
    assert (mixed.jpeg, mixed.PREGENSTEPS) == (release.jpeg, release.PREGENSTEPS)


# ---- Surroundings ----


@pytest.fixture
def folder(tmp_path):
    """A folder with small images in `in/`."""
    (tmp_path / "in").mkdir()
    for name in "abc":
        Image.new("RGB", (9, 8)).save(tmp_path / "in" / f"{name}.png")
    return tmp_path


def test_a_notebook_can_run_the_program_twice(tmp_path, monkeypatch, capsys):
    """As `%run main.py` does: in the notebook's process, where the cells after it still print."""
    tiny.use(monkeypatch.setattr)
    tiny.generator().save_weights(tmp_path / "a.weights.h5")
    Image.new("RGB", (24, 16)).save(tmp_path / "input.jpg")
    monkeypatch.chdir(tmp_path)
    stdout = sys.stdout
    for precision, policy in (("bfloat16", "mixed_bfloat16"), ("float32", "float32")):
        argv = ["main.py", "--pretrained", "--weights", "a.weights.h5", "--precision", precision]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(PROGRAM), run_name="__main__")
        with Image.open("output.jpg") as image:  # the names by default
            assert image.size == (96, 64)
            assert image.format == "JPEG"
            assert image.layer[0][1:3] == image.layer[1][1:3] == (1, 1)  # colours at full resolution
        os.remove("output.jpg")
        print("the next cell")
        assert sys.stdout is stdout
        assert "the next cell" in capsys.readouterr().out
        assert keras.config.dtype_policy().name == policy


@pytest.mark.parametrize("keras_json", [{"image_data_format": "channels_first", "backend": "jax", "epsilon": 1}, []])
def test_keras_set_up_for_something_else(folder, keras_json):
    (folder / "keras.json").write_text(json.dumps(keras_json))
    odd = {"KERAS_HOME": str(folder), "KERAS_BACKEND": "jax"}
    argv = "--pretrained", "--input", "in/a.png", "--output", "a.png"
    done = process(PROGRAM, *argv, cwd=folder, env=os.environ | odd)
    assert done.stderr == ""
    assert done.returncode == 0
    assert sorted(os.listdir(folder)) == ["a.png", "in", "keras.json"]


def test_names_that_the_terminal_cant_show(folder):
    (folder / "in" / "a.png").rename(folder / "in" / "ü.png")
    (folder / "in" / "ö.png").write_text("bad")
    argv = "--pretrained", "--input", "in", "--output", "out"
    done = process(PROGRAM, *argv, cwd=folder, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1
    assert "out/?.png: 36x32" in done.stdout
    assert done.stderr.splitlines()[-1] == "main.py: 1 of 4 images failed"
    assert "\r" not in done.stderr
    assert sorted(os.listdir(folder / "out")) == ["b.png", "c.png", "ü.png"]


@pytest.mark.parametrize("redirection", ["2>&1 | true", ">&- 2>&- <&-"])
def test_a_closed_pipe_or_terminal_is_no_failure(folder, redirection):
    command = f"'{sys.executable}' '{PROGRAM}' --pretrained --input in --output out {redirection}"
    script = f"{command}; for code in ${{PIPESTATUS[0]}}; do exit $code; done"
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode == 0
    assert sorted(os.listdir(folder / "out")) == ["a.png", "b.png", "c.png"]


def test_a_full_disk_behind_stdout_is_a_failure(folder):
    with open("/dev/full", "w") as full:
        argv = [sys.executable, PROGRAM, "--pretrained", "--input", "in/a.png", "--output", "a.png"]
        done = subprocess.run(argv, cwd=folder, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "main.py: [Errno 28] No space left on device\n"


def test_a_full_disk_behind_stderr_stops_no_work(folder):
    (folder / "in" / "a.png").write_text("bad")
    with open("/dev/full", "w") as full:
        argv = [sys.executable, PROGRAM, "--pretrained", "--input", "in", "--output", "out"]
        done = subprocess.run(argv, cwd=folder, stdout=subprocess.PIPE, stderr=full, text=True)
    assert done.returncode == 1
    assert sorted(os.listdir(folder / "out")) == ["b.png", "c.png"]
