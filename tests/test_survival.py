"""Trainings in processes of their own, most of tiny networks: killed, on two devices, on two workers."""

import json
import random
import re
import signal
import socket
import time

import pytest
from test_train import assert_nearly_same, curves, newest, same_files


def start_workers(start, run_dir):
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in (one, other)]
    tasks = [{"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}} for i in range(2)]
    return [start(run_dir, TF_CONFIG=json.dumps(task)) for task in tasks]


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """A folder of runs, and the processes of each by its name."""
    folder = tmp_path_factory.mktemp("runs")
    processes = {"devices": [start(folder / "devices", devices=2)], "workers": start_workers(start, folder / "workers")}
    return folder, processes | {"odd": [start(folder / "odd", "--BATCH_SIZE", 3, devices=2)]}


def finish(process, code=0, timeout=600):
    """Wait for the process to end with this exit code. Returns its output."""
    process.join(timeout)
    output = process.output.read_text()
    assert process.exitcode == code, output[-3000:]
    return output


def wait_for_checkpoint(process, run_dir, phase):
    """Wait until this process has saved one."""
    before = newest(run_dir, phase)
    while newest(run_dir, phase) == before:
        assert process.is_alive(), "ended before it could be killed: give it more steps"
        time.sleep(0.002)


def test_a_run_that_is_killed_ends_like_one_that_is_not(runs, start, whole, tmp_path):
    process = start(tmp_path / "killed")
    wait_for_checkpoint(process, tmp_path / "killed", "gan")
    process.kill()
    finish(process, -signal.SIGKILL)
    time.sleep(1)  # TensorBoard reads the logs in the order of the seconds in which they were begun
    assert "gan: continuing after step" in finish(start(tmp_path / "killed"))
    assert same_files(tmp_path / "killed", whole[0]) and curves(tmp_path / "killed") == curves(whole[0])


@pytest.mark.slow
def test_the_real_networks_killed_twenty_times_a_phase(start, tmp_path, vgg_weights):
    """At random moments, many of which lie in writing a checkpoint."""
    flags = "--PREGENSTEPS 150 --STEPS 150 --eval_every 30 --vgg_layer block2_conv2 --vgg_weights"
    flags = [*flags.split(), vgg_weights]
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    finish(start(whole, *flags, real_networks=True), timeout=3600)
    for phase in ["pretrain"] * 20 + ["gan"] * 20:
        process = start(killed, *flags, real_networks=True)
        wait_for_checkpoint(process, killed, phase)
        time.sleep(rng.uniform(0, 1))
        process.kill()
        process.join()
        time.sleep(1)
    finish(start(killed, *flags, real_networks=True), timeout=3600)
    assert same_files(killed, whole) and curves(killed) == curves(whole)


def test_two_devices_and_two_workers_train_like_one(runs, whole):
    folder, processes = runs
    for name in ("devices", "workers"):
        for process in processes[name]:
            finish(process)
        assert_nearly_same(folder / name, whole[0])
        assert len(list((folder / name).glob("logs/gan/*.v2"))) == 1  # of two workers, the chief's
    assert re.search("main.py: --BATCH_SIZE .* 2 devices\n", finish(processes["odd"][0], 1))


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_worker_that_dies_ends_the_others_and_the_run_can_go_on(start, whole, tmp_path, lost):
    two = tmp_path / "two"
    workers = start_workers(start, two)
    wait_for_checkpoint(workers[0], two, "gan")
    workers[lost].kill()
    assert "main.py: another worker is gone" in finish(workers[1 - lost], 1)
    saved = newest(two, "gan")
    assert 0 < saved < 34
    for worker in start_workers(start, two):
        assert f"gan: continuing after step {saved}" in finish(worker)
    assert_nearly_same(two, whole[0])
