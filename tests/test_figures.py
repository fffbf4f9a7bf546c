"""The README's figures, from the logs of a run that never was."""

import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import make_picture
from PIL import Image

from assets import figures

CURVES = {"pretrain": ["PSNR.svg", "MSE_loss.svg"], "gan": ["perceptual_loss.svg", "discriminator_loss.svg"]}
SCALARS = {"pretrain": ["MSE Loss", "PSNR"], "gan": ["Perceptual Loss", "Discriminator Loss", "PSNR"]}


def write_logs(run, phase, evaluations, picture=make_picture(0, 160, 152)):
    """TensorBoard's points of a phase, tagged as train.py tags them."""
    with tf.summary.create_file_writer(str(run / "logs" / phase)).as_default():
        tf.summary.image("crop/HR", picture[None], step=0)
        tf.summary.image("crop/bicubic", picture[None] // 2, step=0)
        for i in range(evaluations):
            tf.summary.image("crop/SR", picture[None] // 4 * 3 + i, step=10 * i)
            for tag in SCALARS[phase]:
                tf.summary.scalar(tag, 1 / (1 + i), step=10 * i)
    return run


def test_all_figures_of_a_run(tmp_path):
    pytest.importorskip("matplotlib")
    run = write_logs(write_logs(tmp_path / "run", "pretrain", 40), "gan", 3)
    assert figures.main([str(run)], tmp_path) == 0
    made = {path.name for path in tmp_path.iterdir()} - {"run"}
    assert made == {*sum(CURVES.values(), []), "train_video.webp", "architecture.svg", "comparison.png"}
    with Image.open(tmp_path / "train_video.webp") as moving, Image.open(tmp_path / "comparison.png") as sheet:
        assert 20 < moving.n_frames <= 33  # of 40 and 3 evaluations
        assert sheet.width > 1000


def test_phases_of_two_runs_or_one_and_the_same_bytes_each_time(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "comparison", lambda path: None)  # it runs two whole generators, and is of no run
    pretrain, gan = write_logs(tmp_path / "a", "pretrain", 5), write_logs(tmp_path / "b", "gan", 3)
    write_logs(tmp_path / "cut off", "gan", 0)
    both, one = tmp_path / "both", tmp_path / "one"
    both.mkdir()
    one.mkdir()
    assert figures.main([str(pretrain), str(gan)], both) == 0
    assert "Skipped" not in capsys.readouterr().out
    assert figures.main([str(pretrain), str(tmp_path / "cut off")], one) == 0
    said = capsys.readouterr().out
    assert "Skipped SRGAN" in said and "gan: it holds no Discriminator Loss, Perceptual Loss, crop/SR" in said
    for name in CURVES["pretrain"]:
        assert (both / name).read_bytes() == (one / name).read_bytes()
    for name in CURVES["gan"]:
        assert (both / name).exists() and not (one / name).exists()


def test_runs_end_to_end(tmp_path):
    runs = [figures.read(write_logs(tmp_path / name, "gan", n) / "logs" / "gan") for name, n in (("a", 3), ("b", 4))]
    points, starts = figures.join(runs)
    assert starts == [20]
    assert points["PSNR"] == [(0, 1), (10, 1 / 2), (20, pytest.approx(1 / 3))] + [
        (step, pytest.approx(1 / (1 + i))) for i, step in enumerate((20, 30, 40, 50))
    ]
    assert [step for step, _ in points["crop/SR"]] == [0, 10, 20, 20, 30, 40, 50]
    assert len({step for step, _ in runs[0]["crop/SR"]}) == 3  # the runs are as they were
    assert figures.join(runs[:1]) == (runs[0], [])


def test_runs_of_different_crops_are_one_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_logs(tmp_path / "a", "gan", 2)
    write_logs(tmp_path / "b", "gan", 2, make_picture(1, 160, 152))
    with pytest.raises(SystemExit) as stop:
        figures.main([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "different crops" in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.*"))  # nothing half made


def test_the_drawing_is_of_the_networks_as_they_are(tmp_path):
    figures.architecture(tmp_path / "architecture.svg")
    assert (tmp_path / "architecture.svg").read_bytes() == (figures.ROOT / "assets" / "architecture.svg").read_bytes()


def test_no_folder_and_no_matplotlib_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "logs").mkdir()
    for folder, says in ((tmp_path / "none", "no folder"), (tmp_path, "pip install matplotlib")):
        with pytest.raises(SystemExit) as stop:
            figures.main([str(folder)], tmp_path)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and says in error and error.count("\n") == 1


def test_the_hardest_square():
    hr = np.zeros((20, 30, 3), np.uint8)
    bicubic = hr.copy()
    bicubic[12:16, 21:25] = 9
    rows, columns = figures.hardest_square(bicubic, hr, 4)
    assert (rows.start, columns.start) == (12, 21)
