"""The README's figures, from the logs of a run that train.py might have written."""

import importlib.util

import tensorflow as tf
from conftest import make_image
from PIL import Image

import data
import model
from assets import figures

CURVES = {"pretrain": {"PSNR.svg", "MSE_loss.svg"}, "gan": {"perceptual_loss.svg", "discriminator_loss.svg"}}
SCALARS = {"pretrain": ["MSE Loss", "PSNR"], "gan": ["Perceptual Loss", "Discriminator Loss", "PSNR"]}
MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None  # .ci/run installs it


def write_logs(run, phase, evaluations):
    """Write TensorBoard's points of a phase, tagged as train.py tags them."""
    image = make_image(0, 64, 56)
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


class Bicubic:
    """In place of an upscaler, which takes seconds."""

    def __init__(self, network):
        pass

    def load(self, network):
        pass

    def __call__(self, lr):
        return data.bicubic(lr)


def test_all_figures_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "Upscaler", Bicubic)
    run, folder = tmp_path / "run", tmp_path / "assets"
    write_logs(run, "pretrain", 40)
    write_logs(run, "gan", 3)
    files = made(run, folder)
    curves = CURVES["pretrain"] | CURVES["gan"] if MATPLOTLIB else set()
    assert files.keys() == curves | {"train_video.webp", "architecture.svg", "comparison.png"}
    with Image.open(folder / "train_video.webp") as animation:
        assert 20 < animation.n_frames <= 33  # of 40 and 3 validations
    with Image.open(folder / "comparison.png") as comparison:
        assert comparison.width > 800  # two details of at least 400 pixels
    # The drawing in the README shows the networks as they are.
    assert files["architecture.svg"] == (figures.ROOT / "assets" / "architecture.svg").read_bytes()


def test_what_is_missing_is_skipped_and_equal_logs_give_equal_bytes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "comparison", lambda path: None)  # needs no run
    run, always = tmp_path / "run", {"train_video.webp", "architecture.svg"}
    write_logs(run, "pretrain", 5)
    first = made(run, tmp_path / "first")
    assert first.keys() == always | (CURVES["pretrain"] if MATPLOTLIB else set())
    write_logs(run, "gan", 0)  # cut off before the first validation
    assert made(run, tmp_path / "second") == first
    assert "Skipped SRGAN" in capsys.readouterr().out
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert made(run, tmp_path / "without matplotlib").keys() == always
    assert "pip install matplotlib" in capsys.readouterr().out
