"""The command line as users type it."""

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


def test_help_needs_no_package_and_shows_the_known_flags_first():
    done = process("-S", PROGRAM, "-h", check=True)  # -S: without packages
    flags = re.findall(r"^  (--\w+)", done.stdout, re.MULTILINE)
    assert flags[:6] == ["--STEPS", "--PREGENSTEPS", "--BATCH_SIZE", "--lr_pre_gen", "--lr_gen", "--pretrained"]
    assert all(f"(default: {default})" in done.stdout for default in (2000, 128, 0.0001, "paper"))


def test_a_refusal_comes_before_tensorflow_and_is_exit_code_2():
    done = process("-X", "importtime", PROGRAM, "--pretrained", "--input", "nowhere.png")
    assert done.returncode == 2 and "nowhere.png" in done.stderr.splitlines()[-1] and "tensorflow" not in done.stderr
    done = process("-S", PROGRAM, "--pretrained")
    assert done.returncode == 2 and "requirements.txt" in done.stderr and done.stderr.count("\n") == 1


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


WRONG = (
    "--STEPS -1; --STEPS 1.5; --STEPS 9223372036854775808; --PREGENSTEPS x; --BATCH_SIZE 0; --lr_pre_gen 0; "
    "--lr_gen nan; --lr_gen inf; --adversarial -1; --recipe none; --ema 1; --jpeg 90-80; --jpeg 0-80; --jpeg 70-; "
    "--precision float64; --vgg_layer block9_conv9; --save_every 0; --seed -1; --blend 1.5; --run_dir runs[1]; "
    "--nonsense; --pretrain; --ensemble; --skip_existing; --pretrained --evaluate tests; --STEPS 0 --PREGENSTEPS 0; "
    "--input= ; --json a.json"
)
MISSING = "--data_dir nowhere; --vgg_weights nowhere; --weights nowhere; --PREGENSTEPS 0 --run_dir nowhere"


@pytest.mark.parametrize("flags", f"{WRONG}; {MISSING}".split("; "))
def test_wrong_flags_and_missing_files_are_one_line(flags, capsys):
    assert ("nowhere" if "nowhere" in flags else re.split("[ =]", flags)[0]) in refusal(capsys, *flags.split())


def test_the_default_is_the_paper_and_a_flag_beside_a_recipe_wins():
    names = "vgg_layer", "adversarial", "colour", "artifact", "mesh", "penalty", "lr_decay", "ema", "jpeg"
    mixed = "--ema 0 --colour 5 --recipe release --vgg_layer block5_conv4 --adversarial 1e-3"
    for flags, expected in (
        ("", ["block5_conv4", 1e-3, 0, 0, 0, 0, "paper", 0, None]),
        ("--recipe release", ["block3_conv4", 1e-2, 10, 32, 0.3, 0.1, "cosine", 0.999, "60-95"]),
        (mixed, ["block5_conv4", 1e-3, 5, 32, 0.3, 0.1, "cosine", 0, "60-95"]),
    ):
        args = main.parse(flags.split())
        assert [getattr(args, name) for name in names] == expected


def test_a_notebook_can_run_the_program_twice(tmp_path, monkeypatch, capsys):
    """As `%run main.py` does: in the notebook's process, where the cells after it still print."""
    tiny.use(monkeypatch.setattr)
    tiny.generator().save_weights(tmp_path / "a.weights.h5")
    Image.new("RGB", (24, 16)).save(tmp_path / "input.jpg")
    monkeypatch.chdir(tmp_path)
    stdout, flags = sys.stdout, ["--pretrained", "--weights", "a.weights.h5", "--precision"]
    for precision, policy in (("bfloat16", "mixed_bfloat16"), ("float32", "float32")):
        monkeypatch.setattr(sys, "argv", ["main.py", *flags, precision])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(PROGRAM), run_name="__main__")
        with Image.open("output.jpg") as image:  # the names by default
            assert image.size == (96, 64) and image.format == "JPEG"
            assert image.layer[0][1:3] == image.layer[1][1:3] == (1, 1)  # colours at full resolution
        os.remove("output.jpg")
        print("the next cell")
        assert sys.stdout is stdout and "the next cell" in capsys.readouterr().out
        assert keras.config.dtype_policy().name == policy


def test_odd_surroundings(tmp_path):
    """Names that the terminal can't show, and Keras set up for something else."""
    Image.new("RGB", (9, 8)).save(tmp_path / "ü.png")
    (tmp_path / "ö.png").write_text("bad")
    keras_json = {"image_data_format": "channels_first", "floatx": "float16", "backend": "jax"}
    (tmp_path / "keras.json").write_text(json.dumps(keras_json))
    odd = {"KERAS_HOME": str(tmp_path), "KERAS_BACKEND": "jax", "PYTHONIOENCODING": "ascii"}
    done = process(PROGRAM, *"--pretrained --input . --output out".split(), cwd=tmp_path, env=os.environ | odd)
    assert done.returncode == 1 and "?.png" in done.stdout and "1 of 2" in done.stderr and "\r" not in done.stderr
    assert os.listdir(tmp_path / "out") == ["ü.png"]
