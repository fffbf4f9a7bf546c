"""The command line as users type it."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import main

ROOT = Path(main.__file__).resolve().parent


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A copy of the program, so that what it prepares does not land in the repository."""
    folder = tmp_path_factory.mktemp("program")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def run(program, *argv, code=0):
    """Run main.py; fails on another exit code, or a traceback. Returns its output and error lines."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    done = subprocess.run(
        [sys.executable, "main.py", *map(str, argv)],
        cwd=program,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def test_help_is_quick_and_shows_the_known_flags_first(program):
    run(program, "-h")  # a first run compiles the modules
    start = time.perf_counter()
    out, _ = run(program, "-h")
    assert time.perf_counter() - start < 0.5
    shown = re.findall(r"^  (--\w+)", out, re.MULTILINE)
    assert shown[:6] == ["--STEPS", "--PREGENSTEPS", "--BATCH_SIZE", "--lr_pre_gen", "--lr_gen", "--pretrained"]
    text = " ".join(out.split())
    for flag, default in {
        "STEPS": 2000,
        "PREGENSTEPS": 2000,
        "BATCH_SIZE": 128,
        "lr_pre_gen": 0.0001,
        "lr_gen": 0.0001,
    }.items():
        assert re.search(
            rf"--{flag} \S+ [^-]*\(default: {default}\)", text.split("main flags:")[1].replace("pre-train", "")
        ), flag


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--STEPS -1", "--STEPS"),
        ("--STEPS 1.5", "--STEPS"),
        ("--PREGENSTEPS x", "--PREGENSTEPS"),
        ("--BATCH_SIZE 0", "--BATCH_SIZE"),
        ("--lr_pre_gen 0", "--lr_pre_gen"),
        ("--lr_gen nan", "--lr_gen"),
        ("--lr_gen -1e-4", "--lr_gen"),
        ("--STEPS 0 --PREGENSTEPS 0", "nothing to train"),
        ("--PREGENSTEPS 0 --run_dir nowhere", "--PREGENSTEPS above 0"),
        ("--blend 1.5 --pretrained", "--blend"),
        ("--ema 1", "--ema"),
        ("--jpeg 90-80", "--jpeg"),
        ("--jpeg 0-80", "--jpeg"),
        ("--vgg_layer block9_conv9", "--vgg_layer"),
        ("--vgg_weights nowhere.h5", "nowhere.h5"),
        ("--lr_decay linear", "--lr_decay"),
        ("--precision float64", "--precision"),
        ("--save_every 0", "--save_every"),
        ("--eval_every 0", "--eval_every"),
        ("--seed -1", "--seed"),
        ("--data_dir nowhere", "nowhere"),
        ("--weights nowhere.weights.h5", "nowhere.weights.h5"),
        ("--input a.png", "--input goes with --pretrained"),
        ("--output=a.png", "--output goes with --pretrained"),
        ("--json a.json", "--json goes with --evaluate"),
        ("--ensemble", "--ensemble goes with"),
        ("--pretrained --evaluate tests", "one of them"),
        ("--evaluate nowhere", "nowhere"),
        ("--nonsense", "--nonsense"),
    ],
)
def test_wrong_flag_is_one_line_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main.parse(argv.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_flags_reach_the_program():
    args = main.parse(
        "--STEPS 3 --PREGENSTEPS 4 --BATCH_SIZE 5 --lr_pre_gen 1e-3 --lr_gen 2e-4 --jpeg 75-90 --ema 0.9".split()
    )
    assert (args.STEPS, args.PREGENSTEPS, args.BATCH_SIZE, args.lr_pre_gen, args.lr_gen) == (3, 4, 5, 1e-3, 2e-4)
    assert args.jpeg == (75, 90) and args.ema == 0.9 and not args.pretrained
    defaults = main.parse([])
    assert (defaults.vgg_layer, defaults.lr_decay, defaults.precision, defaults.seed) == (
        "block5_conv4",
        "paper",
        "float32",
        0,
    )


def test_train_both_phases_then_upscale(program, photos, vgg_weights, tmp_path):
    """From a folder of photos to a picture four times larger, with the real networks."""
    out, _ = run(
        program, "--data_dir", photos, "--vgg_layer", "block2_conv2", "--vgg_weights", vgg_weights, "--run_dir", tmp_path / "run",
        "--PREGENSTEPS", 3, "--STEPS", 2, "--BATCH_SIZE", 2,
    )  # fmt: skip
    weights = tmp_path / "run" / "srgan.weights.h5"
    assert f"python3 main.py --pretrained --weights {weights}" in out
    tags = {}
    for phase in ("pretrain", "gan"):
        (file,) = (tmp_path / "run" / "logs" / phase).glob("events*")
        events = [tf.compat.v1.Event.FromString(record.numpy()) for record in tf.data.TFRecordDataset(str(file))]
        tags[phase] = {value.tag for event in events for value in event.summary.value}
    assert tags["pretrain"] >= {"MSE Loss", "PSNR"} and tags["gan"] >= {"Perceptual Loss", "Discriminator Loss", "PSNR"}

    hr = np.asarray(Image.open(photos / "valid" / "4.png"))
    Image.fromarray(hr[:20, :28]).save(tmp_path / "small.png")
    run(
        program,
        "--pretrained",
        "--weights",
        weights,
        "--input",
        tmp_path / "small.png",
        "--output",
        tmp_path / "large.png",
    )
    assert Image.open(tmp_path / "large.png").size == (112, 80)


@pytest.mark.parametrize("what", ["empty", "no_picture", "small"])
def test_data_that_cannot_be_used_is_one_line(program, tmp_path, what):
    folder = tmp_path / "photos"
    folder.mkdir()
    if what == "no_picture":
        (folder / "a.png").write_text("text")
    if what == "small":
        Image.fromarray(np.zeros((95, 200, 3), np.uint8)).save(folder / "a.png")
    _, error = run(program, "--data_dir", folder, "--STEPS", 0, "--run_dir", tmp_path / "run", code=1)
    assert "no usable pictures" in error.splitlines()[-1] and error.splitlines()[-1].startswith("main.py: ")


def test_run_folder_that_cannot_be_made_is_one_line(program, photos, tmp_path):
    (tmp_path / "file").write_text("in the way")
    _, error = run(program, "--data_dir", photos, "--STEPS", 0, "--run_dir", tmp_path / "file" / "run", code=1)
    assert error.startswith("main.py: ") and error.count("\n") == 1
