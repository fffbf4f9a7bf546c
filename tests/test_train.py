"""Training: losses and flags, and runs that are cut off and go on, on one device, on two, and on two workers."""

import json
import os
import random
import re
import shutil
import signal
import socket
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from conftest import make_image, refusal, run, training
from PIL import Image

import data
import losses
import main
import model
import train
from assets import figures

pytestmark = pytest.mark.usefixtures("begun", "runs")  # trainings that go on beside the tests

WEIGHTS = ("srresnet.weights.h5", "srgan.weights.h5")


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


@pytest.fixture
def tiny_networks(monkeypatch):
    tiny.use(monkeypatch.setattr)


@pytest.fixture
def finished(tiny_networks, whole, tmp_path):
    """A copy of a finished run, to go on with."""
    return shutil.copytree(whole[0], tmp_path / "run")


def curves(run_dir):
    """{phase: {tag: [(step, value), ...]}} of what TensorBoard shows."""
    return {phase: figures.read(run_dir / "logs" / phase) for phase in ("pretrain", "gan")}


def newest(run_dir, phase):
    """The step of the newest checkpoint, 0 if there is none."""
    return max((int(path.stem) for path in run_dir.glob(f"checkpoints/{phase}/*.index")), default=0)


def same_files(run_dir, other):
    return all((run_dir / name).read_bytes() == (other / name).read_bytes() for name in WEIGHTS)


def assert_nearly_same(run_dir, other):
    for name in WEIGHTS:
        networks = tiny.generator(), tiny.generator()
        for network, folder in zip(networks, (run_dir, other)):
            model.load_weights(network, folder / name)
        for a, b in zip(*(network.get_weights() for network in networks)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_adam_is_kerass_with_the_papers_rates():
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(5, 3)), rng.normal(size=(4, 5, 3))
    variables = [keras.Variable(start, dtype="float32") for _ in range(2)]
    for variable, kind in zip(variables, (keras.optimizers.Adam, train.Adam)):
        optimizer = kind(keras.optimizers.schedules.CosineDecay(1e-2, 4), beta_1=0.9)
        for gradient in gradients:
            optimizer.apply([tf.constant(gradient, tf.float32)], [variable])
    assert abs(variables[0] - start).numpy().min() > 1e-3
    np.testing.assert_allclose(variables[1], variables[0], rtol=1e-5)
    for decay, drop, rates in (("paper", 1, "1 1 .1 .1"), ("paper", 0, "1 1 1 1"), ("cosine", 1, "1 .5 .5 0")):
        optimizer = train.adam(tiny.generator(), 1e-3, 100, decay, drop=drop)
        for step, rate in zip((0, 49, 50, 99), rates.split()):
            optimizer.iterations.assign(step)
            assert float(optimizer.learning_rate) == pytest.approx(1e-3 * float(rate), abs=2e-5)


def test_ema_averages_the_weights_and_checkpoints_come_in_time(tiny_networks, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "KEEP", 100)
    monkeypatch.setattr(train, "SAVE_AFTER", 0)  # seconds, and not minutes
    assert run(*training(photos, tmp_path, *"--PREGENSTEPS 3 --STEPS 0 --save_every 1000 --ema 0.9".split())) == 0
    network, history = tiny.generator(), []
    for step in (1, 2, 3):
        path = tmp_path / "checkpoints" / "pretrain" / f"{step:07d}"
        tf.train.Checkpoint(generator=network).read(str(path)).expect_partial()
        history.append([variable.numpy() for variable in network.trainable_variables])
    model.load_weights(network, tmp_path / WEIGHTS[0])
    for variable, one, two, three in zip(network.trainable_variables, *history):
        assert not np.array_equal(two, three)
        expected = (9 * one + 12 * two + 28 * three) / 49  # a decay of 3/7 instead of 0.9, since there are few steps
        np.testing.assert_allclose(variable, expected, rtol=1e-4, atol=1e-6)
    # Their normalisation has the statistics of their own features.
    images, _ = data.load(photos, photos.with_name("cache"))
    lrs = np.concatenate([lr for lr, _ in data.patches(images, 16, 0, 16, seed=3)])
    features = keras.Model(network.input, network.get_layer("conv").output)(lrs).numpy()
    np.testing.assert_allclose(network.get_layer("trunk").moving_mean, features.mean((0, 1, 2)), rtol=1e-3, atol=1e-4)


def test_numbers_that_are_not_finite_stop_the_run_and_are_not_saved(tiny_networks, photos, tmp_path):
    argv = training(photos, tmp_path, "--STEPS", 0, "--PREGENSTEPS")
    assert run(*argv, 5) == 0
    for rate, save_every, step in ((1e30, 1000, 10), (1e39, 1, 6)):  # the loss breaks; only the weights break
        args = main.parse([*argv, "40", "--save_every", str(save_every)])
        args.lr_pre_gen = rate  # more than the flag takes
        with pytest.raises(data.UserError, match=f"not finite after step {step}"):
            train.train(args)
        assert newest(tmp_path, "pretrain") == 5
    assert run(*argv, 9) == 0  # with a good rate it goes on


def test_a_gan_step_of_the_real_networks_repeats_to_the_bit(vgg_weights, monkeypatch):
    """With operations in varying order, 6 of 15 repetitions differed."""
    monkeypatch.setattr(model, "BLOCKS", 2)  # all of them are alike
    recorded, vgg = [], losses.vgg_features("block2_conv2", vgg_weights)
    monkeypatch.setattr(train, "fit", lambda name, step, state, *rest: recorded.append((step, state)))
    train.train_srgan("gan", 9, 0, model.generator(), vgg, None, None, main.parse(["--recipe", "release"]))
    ((step, state),) = recorded
    for layer in state["generator"].layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.gamma.assign(np.ones(64))  # so that gradients reach all kernels
    compiled, _ = train.compiled(step)
    hrs = [make_image(seed, 96, 96) for seed in range(2)]
    batch = [tf.constant(np.stack(images)) for images in (list(map(data.degrade, hrs)), hrs)]
    variables = [variable for part in state.values() for variable in part.variables]
    start, results = [variable.numpy() for variable in variables], []
    for _ in range(8):
        for variable, value in zip(variables, start):
            variable.assign(value)
        compiled(*batch, tf.constant(0), tf.constant(1))
        results.append(state["generator"].get_weights())
    assert not any(np.array_equal(a, b) for a, b in zip(results[0], start) if a.ndim > 1)  # all kernels moved
    assert all(np.array_equal(a, b) for result in results for a, b in zip(result, results[0]))


def test_the_real_networks_begin_like_bicubic_learn_an_image_and_upscale_it(vgg_weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model, "BLOCKS", 2)
    monkeypatch.setattr(model, "discriminator", tiny.discriminator)  # the test above has the real one
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "VALID_SIZE", 16)
    image = make_image(0, 96, 96)
    for part in ("train", "valid"):
        (tmp_path / "photos" / part).mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / "photos" / part / "a.png")
    flags = "--PREGENSTEPS 30 --STEPS 1 --BATCH_SIZE 1 --ema 0 --lr_pre_gen 1e-3 --save_every 1000 --eval_every 1000"
    flags = [*flags.split(), "--vgg_layer", "block2_conv2", "--vgg_weights", vgg_weights]
    assert run(*training(tmp_path / "photos", tmp_path / "run", *flags)) == 0
    found = curves(tmp_path / "run")
    # At first it upscales like bicubic, in the middle of the image, where validation looks.
    bicubic = losses.psnr(data.bicubic(data.degrade(image)[4:20, 4:20]), image[16:80, 16:80])
    assert found["pretrain"]["PSNR"][0][1] == pytest.approx(bicubic, abs=0.3)
    history = [value for _, value in found["pretrain"]["MSE Loss"]]
    assert np.mean(history[-5:]) < 0.6 * np.mean(history[:5])
    assert found["gan"]["Perceptual Loss"][-1][0] == 1
    Image.fromarray(make_image(0, 28, 20)).save(tmp_path / "a.png")
    command = capsys.readouterr().out.splitlines()[-1].partition("main.py ")[2]  # the last line says how to
    assert run(*command.split(), "--input", tmp_path / "a.png", "--output", tmp_path / "b.png") == 0
    assert Image.open(tmp_path / "b.png").size == (112, 80)


def gan_curves(photos, run_dir, whole, *more):
    """Train only the GAN, from the SRResNet of a whole run. Returns its curves."""
    assert run(*training(photos, run_dir, "--PREGENSTEPS", 0, "--weights", whole[0] / WEIGHTS[0], *more)) == 0
    return curves(run_dir)["gan"]


@pytest.mark.parametrize("flags", ["", "--recipe release --finish 0", "--adversarial 0 --colour 2"])
def test_the_gan_minimises_the_papers_loss_and_what_flags_add(
    tiny_networks, whole, photos, tmp_path, monkeypatch, flags
):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    found = gan_curves(photos, tmp_path, whole, "--STEPS", 2, "--BATCH_SIZE", 1, *flags.split())
    args = main.parse(flags.split())
    for step in (0, 1):
        at = {tag: points[step][1] for tag, points in found.items() if tag.endswith("Loss") or tag[:2] == "D("}
        names = "Adversarial", "Colour", "Artifact", "Mesh"
        weights = {f"{name} Loss": getattr(args, name.lower()) for name in names}
        assert all((tag in at) == (weight > 0) for tag, weight in weights.items())
        expected = at["Content Loss"] + sum(weight * at.get(tag, 0) for tag, weight in weights.items())
        assert at["Perceptual Loss"] == pytest.approx(expected, rel=1e-5)
        # With one patch, equations 6 and 2 follow from what the discriminator says of it.
        if args.adversarial:
            assert at["Adversarial Loss"] == pytest.approx(-np.log(at["D(SR)"]), rel=1e-3)
        told_apart = -np.log(at["D(HR)"]) - np.log(1 - at["D(SR)"])
        penalty = at["Discriminator Loss"] - told_apart
        assert penalty > 0.01 if args.penalty else penalty == pytest.approx(0, abs=1e-3)


def test_the_networks_are_opponents(tiny_networks, whole, photos, tmp_path):
    """The discriminator learns to tell the images apart; a generator that minds it more passes for real more often."""
    flags = ["--lr_gen", 3e-3, "--lr_decay", "none", "--ema", 0, "--save_every", 100, "--adversarial"]
    runs = [gan_curves(photos, tmp_path / str(weight), whole, *flags, weight) for weight in (0, 1000)]
    real, fake, fake_that_minds = runs[0]["D(HR)"][-1][1], runs[0]["D(SR)"][-1][1], runs[1]["D(SR)"][-1][1]
    assert real > 0.7 > 0.3 > fake and fake_that_minds > 2 * fake
    flat = gan_curves(photos, tmp_path / "flat", whole, *flags, 0, "--penalty", 1000)  # a step can't make it steep
    assert abs(flat["D(HR)"][-1][1] - flat["D(SR)"][-1][1]) < 0.1


def test_curves_images_and_lines_of_a_run(whole):
    run_dir, printed = whole
    found, images = curves(run_dir), {"crop/bicubic", "crop/SR", "crop/HR"}
    assert found["pretrain"].keys() == {"MSE Loss", "PSNR"} | images
    names = {f"{name} Loss" for name in ("Perceptual", "Discriminator", "Content", "Adversarial", "Validation Content")}
    assert found["gan"].keys() == {"D(HR)", "D(SR)", "PSNR"} | names | images
    for tag, steps in (("PSNR", [0, 10, 20, 23]), ("crop/SR", [0, 10, 20, 23]), ("MSE Loss", [10, 20, 23])):
        assert [step for step, _ in found["pretrain"][tag]] == steps
    assert sorted(int(path.stem) for path in run_dir.glob("checkpoints/*/*.index")) == [20, 23, 32, 34]
    # Where there is no terminal to draw a bar on, each validation is a line.
    assert "\r" not in printed and printed.count("\npretrain 10/23: ") == printed.count("\ngan 34/34: ") == 1


def test_a_finished_run_is_not_trained_again_and_more_steps_extend_it(finished, whole, photos, capsys):
    for name in WEIGHTS:
        (finished / name).unlink()  # they are made from the checkpoints
    assert run(*training(photos, finished)) == 0 and "compiling" not in capsys.readouterr().out
    assert same_files(finished, whole[0])
    assert run(*training(photos, finished, "--STEPS", 37)) == 0
    assert [step for step, _ in curves(finished)["gan"]["PSNR"]] == [0, 10, 20, 30, 34, 37]


def test_finish_goes_on_with_a_new_discriminator(finished, photos, capsys):
    before, flags = (finished / WEIGHTS[1]).read_bytes(), ("--finish", 6)
    assert run(*training(photos, finished, *flags)) == 0 and "finish: compiling" in capsys.readouterr().out
    assert (finished / "gan.weights.h5").read_bytes() == before != (finished / WEIGHTS[1]).read_bytes()
    assert [step for step, _ in figures.read(finished / "logs" / "finish")["PSNR"]] == [0, 6]
    name = "discriminator_optimizer/_iterations/.ATTRIBUTES/VARIABLE_VALUE"
    assert tf.train.load_variable(f"{finished}/checkpoints/finish/0000006", name) == 6
    assert run(*training(photos, finished, *flags)) == 0 and "compiling" not in capsys.readouterr().out
    for flag, value in (("--STEPS", 50), ("--colour", 1)):
        assert flag in refusal(capsys, *training(photos, finished, *flags), flag, value, started=True)


def test_finish_alone_needs_no_gan_before(tiny_networks, whole, photos, tmp_path):
    flags = [*"--PREGENSTEPS 0 --STEPS 0 --finish 6 --weights".split(), whole[0] / WEIGHTS[1]]
    assert run(*training(photos, tmp_path, *flags)) == 0 and {p.name for p in tmp_path.glob("*.h5")} == {WEIGHTS[1]}


def test_what_may_not_change_when_a_run_goes_on(finished, photos, tmp_path, capsys):
    moved = shutil.copytree(photos, tmp_path / "moved", copy_function=shutil.copy)  # the same at another place and time
    assert run(*training(moved, finished, "--lr_gen", 1e-5, "--save_every", 7)) == 0
    later = "--adversarial 0.5 --colour 1 --vgg_layer block2_conv2".split()
    others = [*later, *"--PREGENSTEPS 40 --BATCH_SIZE 8 --ema 0 --seed 4 --jpeg 70".split()]
    for flag, value in zip(others[::2], others[1::2]):
        assert flag.strip("-") in refusal(capsys, *training(photos, finished, flag, value), started=True)
    shutil.copy(moved / "valid" / "4.png", moved / "train" / "0.png")
    assert "images" in refusal(capsys, *training(moved, finished), started=True)
    shutil.rmtree(finished / "checkpoints" / "gan")  # before the GAN has begun, its flags may change
    assert run(*training(photos, finished, "--STEPS", 1, *later)) == 0


def signal_at(run_dir, phase, step, number):
    """Send this process a signal when the run has saved a checkpoint of this step."""

    def watch():
        while newest(run_dir, phase) < step:
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


def interrupt(argv, run_dir, phase, step, number, capsys):
    """Interrupt a training, and check how it ends. Returns the step that it has saved."""
    signal_at(run_dir, phase, step, number)
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 128 + number
    assert f" {newest(run_dir, phase)}: " in capsys.readouterr().out.splitlines()[-1]
    return newest(run_dir, phase)


def test_a_run_that_signals_interrupt_ends_like_one_that_is_not(tiny_networks, whole, photos, tmp_path, capsys):
    argv = training(photos, tmp_path)
    assert 4 <= interrupt(argv, tmp_path, "pretrain", 4, signal.SIGHUP, capsys) < 23
    assert 4 <= interrupt(argv, tmp_path, "gan", 4, signal.SIGTERM, capsys) < 32
    assert not (tmp_path / WEIGHTS[1]).exists()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does, and nothing stops
    signal_at(tmp_path, "gan", newest(tmp_path, "gan") + 1, signal.SIGHUP)
    assert run(*argv) == 0 and same_files(tmp_path, whole[0])


def test_the_loop_of_a_gpu_trains_like_single_steps(tiny_networks, whole, photos, tmp_path, monkeypatch, capsys):
    """From a checkpoint within ten steps, to a number of steps that is no multiple of ten, and interrupted."""
    argv = training(photos, tmp_path)
    assert run(*argv, "--PREGENSTEPS", 13, "--STEPS", 0) == 0
    monkeypatch.setattr(train, "LOOP", True)
    assert interrupt(argv, tmp_path, "gan", 10, signal.SIGINT, capsys) in (10, 20, 30)
    assert run(*argv) == 0
    assert_nearly_same(tmp_path, whole[0])
    ours, theirs = curves(tmp_path), curves(whole[0])
    for phase, tag in ((phase, tag) for phase in theirs for tag in theirs[phase] if not tag.startswith("crop")):
        points = [point for point in ours[phase][tag] if point[0] != 13]  # the end of the first command
        np.testing.assert_allclose(points, theirs[phase][tag], rtol=1e-3)


@pytest.mark.parametrize("damage", ["flipped byte", "half", "empty index"])
def test_a_damaged_checkpoint_is_passed_over(finished, whole, photos, capsys, damage):
    """As a power cut, a full disk or a bad one leave it."""
    file = finished / "checkpoints" / "gan" / "0000034.data-00000-of-00001"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content[: len(content) // 2] if damage == "half" else content)
    if damage == "empty index":
        file.with_name("0000034.index").write_bytes(b"")
    (finished / WEIGHTS[1]).unlink()
    assert run(*training(photos, finished)) == 0 and same_files(finished, whole[0])
    printed = capsys.readouterr()
    assert "gan/0000034" in printed.err and "gan: 32 of 34 steps are done" in printed.out


def test_what_stops_a_run_is_one_line(finished, photos, tmp_path, monkeypatch, capsys):
    with data.lock(finished, wait=False):  # by another run
        assert str(finished) in refusal(capsys, *training(photos, finished), started=True)
    for config in ("nonsense", '{"cluster": {"worker": ["127.0.0.1:1"]}}'):
        with monkeypatch.context() as patch:
            patch.setenv("TF_CONFIG", config)
            assert "TF_CONFIG" in refusal(capsys, *training(photos, finished), started=True)

    def fail():
        raise error(None, None, "OOM, or a closed socket\nand more")

    for name, error in (("--BATCH_SIZE", tf.errors.ResourceExhaustedError), ("worker", tf.errors.UnavailableError)):
        with monkeypatch.context() as patch:
            patch.setattr(model, "discriminator", fail)
            assert name in refusal(capsys, *training(photos, finished), started=True)
    for file in finished.glob("checkpoints/gan/*.index"):
        file.write_bytes(b"")
    assert run(*training(photos, finished)) == 1
    assert "checkpoints/gan" in capsys.readouterr().err.splitlines()[-1]


def finish(process, code=0, timeout=600):
    """Wait for the process to end with this exit code. Returns its output."""
    process.join(timeout)
    output = process.output.read_text()
    assert process.exitcode == code, output[-3000:]
    return output


def kill(process, run_dir, phase, delay=0):
    """Kill a training when it has saved one more checkpoint of the phase, and these seconds have passed."""
    before = newest(run_dir, phase)
    while newest(run_dir, phase) == before:
        assert process.is_alive(), "ended before it could be killed: give it more steps"
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    time.sleep(1)  # TensorBoard reads the logs in the order of the seconds in which they were begun


def test_a_run_that_is_killed_ends_like_one_that_is_not(start, whole, tmp_path):
    killed = tmp_path / "killed"
    kill(start(killed), killed, "gan")
    assert "of 34 steps are done" in finish(start(killed))
    assert same_files(killed, whole[0]) and curves(killed) == curves(whole[0])


@pytest.mark.slow
def test_the_real_networks_killed_twenty_times_a_phase(start, tmp_path, vgg_weights):
    """At random moments, many of which lie in writing a checkpoint."""
    flags = "--PREGENSTEPS 150 --STEPS 150 --eval_every 30 --vgg_layer block2_conv2 --vgg_weights"
    flags = [*flags.split(), vgg_weights]
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    finish(start(whole, *flags, real_networks=True), timeout=3600)
    for phase in ["pretrain"] * 20 + ["gan"] * 20:
        kill(start(killed, *flags, real_networks=True), killed, phase, rng.uniform(0, 1))
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
    kill(workers[lost], two, "gan")
    assert "main.py: another worker is gone" in finish(workers[1 - lost], 1)
    saved = newest(two, "gan")
    assert 0 < saved < 34
    for worker in start_workers(start, two):
        assert f"gan: {saved} of 34 steps are done" in finish(worker)
    assert_nearly_same(two, whole[0])
