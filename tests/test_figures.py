"""The README's figures, from the logs of a run that train.py might have written."""

import importlib.util

import pytest
import tensorflow as tf
from conftest import make_image
from PIL import Image

from assets import figures

CURVES = {"pretrain": {"PSNR.svg", "MSE_loss.svg"}, "gan": {"perceptual_loss.svg", "discriminator_loss.svg"}}
SCALARS = {"pretrain": ["MSE Loss", "PSNR"], "gan": ["Perceptual Loss", "Discriminator Loss", "PSNR"]}
MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None  # .ci/run installs it


def write_logs(run, phase, evaluations):
    """Write TensorBoard's points of a phase, tagged as train.py tags them."""
    image = make_image(0, 160, 152)
    with tf.summary.create_file_writer(str(run / "logs" / phase)).as_default():
        tf.summary.image("crop/HR", image[None], step=0)
        tf.summary.image("crop/bicubic", image[None] // 2, step=0)
        for i in range(evaluations):
            tf.summary.image("crop/SR", image[None] // 4 * 3 + i, step=10 * i)
            for tag in SCALARS[phase]:
                tf.summary.scalar(tag, 1 / (1 + i), step=10 * i)


def made(run, folder):
    folder.mkdir()
    assert figures.main([str(run)], folder) == 0
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_figures_of_a_run(tmp_path):
    run = tmp_path / "run"
    write_logs(run, "pretrain", 40)
    write_logs(run, "gan", 3)
    names = made(run, tmp_path / "assets").keys()
    curves = CURVES["pretrain"] | CURVES["gan"] if MATPLOTLIB else set()
    assert names == curves | {"train_video.webp", "architecture.svg", "comparison.png"}
    with Image.open(tmp_path / "assets" / "train_video.webp") as animation:
        assert 20 < animation.n_frames <= 33  # of 40 and 3 validations
    with Image.open(tmp_path / "assets" / "comparison.png") as comparison:
        assert comparison.width > 800  # two details of at least 400 pixels


def test_a_phase_without_whole_logs_is_skipped_and_equal_logs_give_equal_bytes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "comparison", lambda path: None)  # needs no run, and takes seconds
    run = tmp_path / "run"
    write_logs(run, "pretrain", 5)
    first = made(run, tmp_path / "first")
    write_logs(run, "gan", 0)  # cut off before the first validation
    second = made(run, tmp_path / "second")
    assert "Skipped SRGAN" in capsys.readouterr().out
    assert first == second
    assert first.keys() == {"train_video.webp", "architecture.svg"} | (CURVES["pretrain"] if MATPLOTLIB else set())


def test_without_matplotlib_only_the_curves_are_skipped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "comparison", lambda path: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    write_logs(tmp_path / "run", "pretrain", 2)
    assert made(tmp_path / "run", tmp_path / "assets").keys() == {"train_video.webp", "architecture.svg"}
    assert "pip install matplotlib" in capsys.readouterr().out


def test_the_drawing_shows_the_networks_as_they_are(tmp_path):
    figures.architecture(tmp_path / "architecture.svg")
    assert (tmp_path / "architecture.svg").read_bytes() == (figures.ROOT / "assets" / "architecture.svg").read_bytes()


def test_a_missing_run_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        figures.main([str(tmp_path / "none")], tmp_path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "no such folder" in error and error.count("\n") == 1
