"""Whole training processes, with tiny networks: killed at random moments, on two devices, on two workers."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_train import same_result, weights

TINY = Path(__file__).with_name("tiny.py")


@pytest.fixture
def start(photos, tmp_path):
    """`start(run_dir, flags, **environment)` starts a training and returns the process, with its output in one pipe."""
    processes = []

    def start(run_dir, flags, **environment):
        command = [
            sys.executable,
            TINY,
            "--data_dir",
            photos,
            "--run_dir",
            run_dir,
            "--BATCH_SIZE",
            "4",
            *flags.split(),
        ]
        environment = {**os.environ, "TINY_FOLDER": str(tmp_path), **environment}
        output = open(run_dir.with_suffix(f".{len(processes)}.log"), "w+")
        processes.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, text=True))
        processes[-1].output = output
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.output.close()


def finish(process, code=0, timeout=200):
    """Wait for the process to end with this exit code. Returns its output."""
    returned = process.wait(timeout)
    process.output.seek(0)
    output = process.output.read()
    assert returned == code, output[-3000:]
    return output


def newest(run_dir, phase):
    return max((int(path.name[-7:]) for path in run_dir.glob(f"checkpoints/{phase}-*[0-9]")), default=0)


def wait_for_checkpoint(process, run_dir, phase):
    """Wait until this process has saved one."""
    before = newest(run_dir, phase)
    while newest(run_dir, phase) == before:
        assert process.poll() is None, "ended before it could be killed: give it more steps"
        time.sleep(0.002)


@pytest.mark.parametrize(
    "networks, kills, steps", [("tiny", 1, 90), pytest.param("real", 20, 150, marks=pytest.mark.slow)]
)
def test_a_run_that_is_killed_at_random_ends_like_one_that_is_not(start, tmp_path, vgg_weights, networks, kills, steps):
    """Many of these moments lie in the writing of a checkpoint."""
    rng = random.Random(0)
    flags = f"--PREGENSTEPS {steps} --STEPS {steps} --save_every 2 --eval_every 30 --ema 0.9"
    flags += f" --vgg_layer block2_conv2 --vgg_weights {vgg_weights}"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, flags, TINY_NETWORKS=networks), timeout=3600)
    for phase in ("pretrain", "gan"):
        for _ in range(kills):
            process = start(killed, flags, TINY_NETWORKS=networks)
            wait_for_checkpoint(process, killed, phase)
            time.sleep(rng.uniform(0, 0.2 if networks == "tiny" else 1))
            process.kill()
            finish(process, -signal.SIGKILL)
    output = finish(start(killed, flags, TINY_NETWORKS=networks), timeout=3600)
    assert "gan: continuing after step" in output
    same_result(killed, whole)
    assert not list(killed.glob("checkpoints/*.new"))


def test_waiting_for_a_worker_names_all_and_can_be_interrupted(start, tmp_path):
    worker = start_workers(start, tmp_path / "run", FLAGS, count=1)[0]
    while "Waiting for all workers of TF_CONFIG: 127.0.0.1:" not in Path(worker.output.name).read_text():
        assert worker.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    worker.send_signal(signal.SIGINT)
    assert worker.wait(timeout=20) == -signal.SIGINT


FLAGS = "--PREGENSTEPS 8 --STEPS 90 --save_every 5 --eval_every 8 --seed 3 --ema 0.9"


def nearly_same_result(run, other):
    for name in ("srresnet", "srgan"):
        for a, b in zip(weights(run / f"{name}.weights.h5"), weights(other / f"{name}.weights.h5")):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_two_devices_train_like_one(start, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = "--PREGENSTEPS 8 --STEPS 8 --ema 0.9"
    finish(start(one, flags))
    assert "Training on 2 devices" in finish(start(two, flags, TINY_DEVICES="2"))
    nearly_same_result(two, one)
    assert "--BATCH_SIZE 4 can't be shared equally by 3" in finish(
        start(tmp_path / "three", flags, TINY_DEVICES="3"), 1
    )


def start_workers(start, run_dir, flags, count=2):
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        cluster = {"worker": [f"127.0.0.1:{each.getsockname()[1]}" for each in (one, other)]}
    return [
        start(run_dir, flags, TF_CONFIG=json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}}))
        for i in range(count)
    ]


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.slow)])  # TensorFlow misses the chief soonest
def test_two_workers_train_like_one_even_if_one_dies(start, tmp_path, lost):
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(one, FLAGS))
    workers = start_workers(start, two, FLAGS)
    wait_for_checkpoint(workers[0], two, "gan")
    workers[lost].kill()
    assert "main.py: another worker is gone: start the same command" in finish(workers[1 - lost], 1)
    saved = newest(two, "gan")
    assert 0 < saved < 90
    for worker in start_workers(start, two, FLAGS):
        assert f"gan: continuing after step {saved}" in finish(worker)
    nearly_same_result(two, one)
    assert len(list(two.glob("logs/gan/*"))) == 2  # one file of each chief


@pytest.mark.parametrize("config", ["nonsense", '{"cluster": {"worker": ["127.0.0.1:1"]}}'])
def test_a_wrong_tf_config_is_one_clear_line(start, tmp_path, config):
    output = finish(start(tmp_path / "run", FLAGS, TF_CONFIG=config), 1)
    assert output.splitlines()[-1].startswith("main.py: TF_CONFIG doesn't name the workers")
