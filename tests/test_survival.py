"""Whole training processes, most with tiny networks: killed at random moments, on two devices, on two workers."""

import os
import random
import signal
import time

import numpy as np
import pytest
from conftest import FLAGS, start_workers
from PIL import Image
from test_train import points, same_result, weights

import main


def finish(process, code=0, timeout=600):
    """Wait for the process to end with this exit code. Returns its output."""
    process.join(timeout)
    output = process.output.read_text()
    assert process.exitcode == code, output[-3000:]
    return output


def finished(runs, name):
    """The folder of a run, and what each of its processes printed."""
    folder, processes = runs
    return folder / name, [finish(process) for process in processes[name]]


@pytest.fixture(scope="module")
def whole(runs):
    """The folder of a run that nothing disturbs."""
    return finished(runs, "whole")[0]


def newest(run_dir, phase):
    return max((int(path.name[-7:]) for path in run_dir.glob(f"checkpoints/{phase}-*[0-9]")), default=0)


def wait_for_checkpoint(process, run_dir, phase):
    """Wait until this process has saved one."""
    before = newest(run_dir, phase)
    while newest(run_dir, phase) == before:
        assert process.is_alive(), "ended before it could be killed: give it more steps"
        time.sleep(0.002)


def kill_at_random(start, run_dir, flags, kills, longest_wait, **options):
    """Kill as many processes of each phase, then let one finish. Many of these moments lie in writing a checkpoint."""
    rng = random.Random(0)
    for phase, count in kills.items():
        for _ in range(count):
            process = start(run_dir, flags, **options)
            wait_for_checkpoint(process, run_dir, phase)
            time.sleep(rng.uniform(0, longest_wait))
            process.kill()
            finish(process, -signal.SIGKILL)
    assert "gan: continuing after step" in finish(start(run_dir, flags, **options), timeout=3600)
    assert not list(run_dir.glob("checkpoints/*.new"))


def test_a_run_that_is_killed_ends_like_one_that_is_not(start, runs, tmp_path):
    kill_at_random(start, tmp_path / "killed", FLAGS, {"gan": 1}, longest_wait=0.2)
    same_result(tmp_path / "killed", finished(runs, "whole")[0])


@pytest.mark.slow
def test_the_real_networks_killed_twenty_times_a_phase(start, tmp_path, vgg_weights):
    flags = "--PREGENSTEPS 150 --STEPS 150 --save_every 2 --eval_every 30 --ema 0.9 --vgg_layer block2_conv2"
    flags += f" --vgg_weights {vgg_weights}"
    finish(start(tmp_path / "whole", flags, real_networks=True), timeout=3600)
    kills = {"pretrain": 20, "gan": 20}
    kill_at_random(start, tmp_path / "killed", flags, kills, longest_wait=1, real_networks=True)
    same_result(tmp_path / "killed", tmp_path / "whole")


def test_waiting_for_a_worker_names_all_and_can_be_interrupted(start, tmp_path):
    worker = start_workers(start, tmp_path / "run", count=1)[0]
    while "Waiting for all workers of TF_CONFIG: 127.0.0.1:" not in worker.output.read_text():
        assert worker.is_alive()
        time.sleep(0.1)
    time.sleep(1)
    os.kill(worker.pid, signal.SIGINT)
    finish(worker, -signal.SIGINT, timeout=20)


def nearly_same_result(run, other):
    for name in ("srresnet", "srgan"):
        for a, b in zip(weights(run / f"{name}.weights.h5"), weights(other / f"{name}.weights.h5")):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_two_devices_train_like_one(runs, whole):
    run_dir, (output,) = finished(runs, "devices")
    assert "Training on 2 devices" in output
    nearly_same_result(run_dir, whole)


def test_two_workers_train_like_one(runs, whole):
    run_dir, outputs = finished(runs, "workers")
    assert all("Training on 2 devices" in output for output in outputs)
    nearly_same_result(run_dir, whole)
    assert len(list(run_dir.glob("logs/gan/*.v2"))) == 1  # the chief's


def test_train_both_phases_then_upscale(runs, photos, tmp_path):
    """From a folder of photos to an image four times larger, with the real networks."""
    run_dir, (output,) = finished(runs, "real")
    weights = run_dir / "srgan.weights.h5"
    assert f"python3 main.py --pretrained --weights {weights}" in output
    tags = {phase: {tag for tag, _ in points(run_dir / "logs" / phase)} for phase in ("pretrain", "gan")}
    assert tags["pretrain"] >= {"MSE Loss", "PSNR"} and tags["gan"] >= {"Perceptual Loss", "Discriminator Loss", "PSNR"}

    Image.open(photos / "valid" / "4.png").crop((0, 0, 28, 20)).save(tmp_path / "a.png")
    argv = ["--pretrained", "--weights", weights, "--input", tmp_path / "a.png", "--output", tmp_path / "b.png"]
    assert main.main(list(map(str, argv))) == 0
    assert Image.open(tmp_path / "b.png").size == (112, 80)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_worker_that_dies_ends_the_others_and_the_run_can_go_on(start, whole, tmp_path, lost):
    two = tmp_path / "two"
    workers = start_workers(start, two)
    wait_for_checkpoint(workers[0], two, "gan")
    workers[lost].kill()
    assert "main.py: another worker is gone: start the same command" in finish(workers[1 - lost], 1)
    saved = newest(two, "gan")
    assert 0 < saved < 40
    for worker in start_workers(start, two):
        assert f"gan: continuing after step {saved}" in finish(worker)
    nearly_same_result(two, whole)
