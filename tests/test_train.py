"""Training: losses and flags, and runs that are cut off and go on, on one device, on two, and on two workers."""

import functools
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import time
from pathlib import Path

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

SRRESNET = "srresnet.weights.h5"
SRGAN = "srgan.weights.h5"
RELEASE = ("--recipe", "release", "--finish", "6")


def start_workers(start, run_dir):
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [one.getsockname()[1], other.getsockname()[1]]
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    workers = []
    for index in range(2):
        config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        workers.append(start(run_dir, TF_CONFIG=json.dumps(config)))
    return workers


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """A folder of runs, and the processes of each by its name."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, {
        "devices": [start(folder / "devices", devices=2)],
        "workers": start_workers(start, folder / "workers"),
        "odd": [start(folder / "odd", "--BATCH_SIZE", 3, devices=2)],
        "recipe": [start(folder / "recipe", *RELEASE)],
        "recipe on two": [start(folder / "recipe on two", *RELEASE, devices=2)],
    }


@pytest.fixture
def tiny_networks(monkeypatch):
    tiny.use(monkeypatch.setattr)


@pytest.fixture
def finished(tiny_networks, whole, tmp_path):
    """A copy of a finished run, to go on with."""
    return shutil.copytree(whole[0], tmp_path / "run")


@pytest.fixture
def short_networks(monkeypatch):
    """The real generator with 2 of its 16 blocks, all of which are alike."""
    monkeypatch.setattr(model, "generator", functools.partial(model.generator, blocks=2))


def curves(run_dir, phase):
    """{tag: [(step, value), ...]} of what TensorBoard shows."""
    return figures.read(run_dir / "logs" / phase)


def last(curve):
    return curve[-1][1]


def steps(curve):
    return [step for step, _ in curve]


def saved_steps(run_dir, phase):
    return sorted(int(path.stem) for path in run_dir.glob(f"checkpoints/{phase}/*.index"))


def newest(run_dir, phase):
    """The step of the newest checkpoint, 0 if there is none."""
    return max(saved_steps(run_dir, phase), default=0)


def assert_same_files(run_dir, other):
    for name in (SRRESNET, SRGAN):
        assert (run_dir / name).read_bytes() == (other / name).read_bytes()


def assert_same_curves(run_dir, other):
    for phase in ("pretrain", "gan"):
        assert curves(run_dir, phase) == curves(other, phase)


def assert_nearly_same(run_dir, other):
    """Networks upscale an image alike. Not so their weights: a bias before a normalisation drifts."""
    network = tiny.generator()
    image = np.float32(make_image(9)[None])
    for name in (SRRESNET, SRGAN):
        model.load_weights(network, run_dir / name)
        ours = network(image)
        model.load_weights(network, other / name)
        assert np.mean(np.abs(ours - network(image))) < 0.02  # one step less: 0.08


# ---- The optimizer, averages and validation ----


@pytest.mark.parametrize(
    ("phase", "decay", "shares"),
    [
        ("gan", "paper", (1, 1, 0.1, 0.1)),
        ("pretrain", "paper", (1, 1, 1, 1)),
        ("gan", "cosine", (1, 0.5, 0.5, 0)),
        ("gan", "none", (1, 1, 1, 1)),
    ],
)
def test_learning_rates(phase, decay, shares):
    """Of 100 steps, at the first, those in the middle, and the last."""
    args = main.parse(["--lr_gen", "1e-3", "--lr_pre_gen", "1e-3", "--lr_decay", decay])
    optimizer = train.adam(tiny.generator(), phase, 100, args)
    for step, share in zip((0, 49, 50, 99), shares):
        optimizer.iterations.assign(step)
        assert float(optimizer.learning_rate) == pytest.approx(1e-3 * share, abs=2e-5)


def test_ema_averages_the_weights_and_checkpoints_come_in_time(tiny_networks, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "KEEP", 100)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    flags = "--PREGENSTEPS 3 --STEPS 0 --save_every 1000 --ema 0.9"
    assert run(*training(photos, tmp_path, *flags.split())) == 0
    network = tiny.generator()
    history = []
    for step in (1, 2, 3):
        path = tmp_path / "checkpoints" / "pretrain" / f"{step:07d}"
        tf.train.Checkpoint(generator=network).read(str(path)).expect_partial()
        history.append([variable.numpy() for variable in network.trainable_variables])
    model.load_weights(network, tmp_path / SRRESNET)
    for variable, one, two, three in zip(network.trainable_variables, *history):
        assert not np.array_equal(two, three)
        expected = (9 * one + 12 * two + 28 * three) / 49  # a decay of 3/7 instead of 0.9, since there are few steps
        np.testing.assert_allclose(variable, expected, rtol=1e-4, atol=1e-6)
    # Their normalisation has the statistics of their own features.
    images, _ = data.load(photos, photos.with_name("cache"))
    ((lrs, _),) = data.patches(images, train.Average.PATCHES, 0, 1, seed=3)
    features = keras.Model(network.input, network.get_layer("conv").output)(lrs).numpy()
    mean = features.mean((0, 1, 2))
    np.testing.assert_allclose(network.get_layer("trunk").moving_mean, mean, rtol=1e-3, atol=1e-4)


def test_curves_images_and_lines_of_a_run(whole):
    run_dir, printed = whole
    images = {"crop/bicubic", "crop/SR", "crop/HR"}
    pretrain = curves(run_dir, "pretrain")
    gan = curves(run_dir, "gan")
    assert pretrain.keys() == {"MSE Loss", "PSNR"} | images
    loss_names = {"Perceptual Loss", "Discriminator Loss", "Content Loss", "Adversarial Loss"}
    assert gan.keys() == {"D(HR)", "D(SR)", "PSNR", "Validation Content Loss"} | loss_names | images
    assert steps(pretrain["PSNR"]) == [0, 10, 20, 23]
    assert steps(pretrain["crop/SR"]) == [0, 10, 20, 23]
    assert steps(pretrain["MSE Loss"]) == [10, 20, 23]
    assert saved_steps(run_dir, "pretrain") == [20, 23]
    assert saved_steps(run_dir, "gan") == [32, 34]
    # Where there is no terminal to draw a bar on, each validation is a line.
    assert "\r" not in printed
    assert printed.count("\npretrain 10/23: ") == 1
    assert printed.count("\ngan 34/34: ") == 1


# ---- What is trained ----


def gan_curves(photos, run_dir, whole, *more):
    """Train only the GAN, from the SRResNet of a whole run. Returns its curves."""
    flags = ("--PREGENSTEPS", 0, "--weights", whole[0] / SRRESNET)
    assert run(*training(photos, run_dir, *flags, *more)) == 0
    return curves(run_dir, "gan")


@pytest.mark.parametrize("flags", ["", "--recipe release --finish 0", "--adversarial 0 --colour 2 --mesh 0.5"])
def test_the_gan_minimises_the_papers_loss_and_what_flags_add(
    tiny_networks, whole, photos, tmp_path, monkeypatch, flags
):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    found = gan_curves(photos, tmp_path, whole, "--STEPS", 2, "--BATCH_SIZE", 1, *flags.split())
    args = main.parse(flags.split())
    for i in range(2):
        expected = found["Content Loss"][i][1]
        mesh = 0 if args.adversarial else args.mesh  # which a discriminator makes needless
        for name, weight in {"Adversarial": args.adversarial, "Colour": args.colour, "Mesh": mesh}.items():
            tag = f"{name} Loss"
            assert (tag in found) == (weight > 0)
            if weight:
                expected += weight * found[tag][i][1]
        assert found["Perceptual Loss"][i][1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("penalty", [0, 1])
def test_what_the_discriminator_says_gives_its_loss_and_the_generators(
    tiny_networks, whole, photos, tmp_path, monkeypatch, penalty
):
    """With one patch, equations 6 and 2 follow from D(SR) and D(HR)."""
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    found = gan_curves(photos, tmp_path, whole, "--STEPS", 1, "--BATCH_SIZE", 1, "--penalty", penalty)
    d_hr = last(found["D(HR)"])
    d_sr = last(found["D(SR)"])
    assert last(found["Adversarial Loss"]) == pytest.approx(-np.log(d_sr), rel=1e-3)
    added = last(found["Discriminator Loss"]) + np.log(d_hr) + np.log(1 - d_sr)
    if penalty:
        assert added > 0.01
    else:
        assert added == pytest.approx(0, abs=1e-3)


def test_the_networks_are_opponents(tiny_networks, whole, photos, tmp_path):
    """The discriminator learns to tell the images apart; a generator that minds it more passes for real more often."""
    flags = "--lr_gen 3e-3 --lr_decay none --ema 0 --save_every 100 --eval_every 100 --adversarial".split()
    idle = gan_curves(photos, tmp_path / "idle", whole, *flags, 1e-9)
    minding = gan_curves(photos, tmp_path / "minding", whole, *flags, 1000)
    assert last(idle["D(HR)"]) > 0.7
    assert last(idle["D(SR)"]) < 0.3
    assert last(minding["D(SR)"]) > 2 * last(idle["D(SR)"])
    flat = gan_curves(photos, tmp_path / "flat", whole, *flags, 1e-9, "--penalty", 1000)  # a step can't make it steep
    assert abs(last(flat["D(HR)"]) - last(flat["D(SR)"])) < 0.1


def test_without_adversarial_loss_there_is_no_discriminator(tiny_networks, whole, photos, tmp_path, monkeypatch):
    monkeypatch.delattr(model, "discriminator")
    flags = ("--adversarial", 0, "--finish", 6)
    found = gan_curves(photos, tmp_path / "run", whole, *flags)
    assert "D(SR)" not in found
    assert "Discriminator Loss" not in found
    assert last(found["Content Loss"]) < found["Content Loss"][0][1]
    assert saved_steps(tmp_path / "run", "finish") == [4, 6]
    again = gan_curves(photos, tmp_path / "run", whole, *flags)
    assert again == found


def test_bfloat16_trains_nearly_like_float32(tiny_networks, whole, photos, tmp_path):
    argv = training(photos, tmp_path, "--precision", "bfloat16")
    assert run(*argv) == 0
    for phase, tag in (("pretrain", "MSE Loss"), ("gan", "Content Loss")):
        found = curves(tmp_path, phase)[tag]
        expected = curves(whole[0], phase)[tag]
        assert found != expected
        np.testing.assert_allclose(found, expected, rtol=0.1)


def test_a_gan_step_of_the_real_networks_repeats_to_the_bit(vgg_weights, short_networks):
    """With operations in varying order, 6 of 15 repetitions differed."""
    vgg = losses.vgg_features("block2_conv2", vgg_weights)
    args = main.parse(["--recipe", "release"])
    phase = train.srgan_phase("gan", 9, 0, model.generator(), vgg, args)
    generator = phase.state["generator"]
    for layer in generator.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.gamma.assign(np.ones(64))  # so that gradients reach all kernels
    call, _ = train.compile_step(phase.step)
    hrs = np.stack([make_image(seed, 96, 96) for seed in range(2)])
    lrs = np.stack([data.degrade(hr) for hr in hrs])
    variables = [variable for part in phase.state.values() for variable in part.variables]
    beginning = [variable.numpy() for variable in variables]
    before = generator.get_weights()
    results = []
    for _ in range(8):
        for variable, value in zip(variables, beginning):
            variable.assign(value)
        call(tf.constant(lrs), tf.constant(hrs), tf.constant(0), tf.constant(1))
        results.append(generator.get_weights())
    for old, new in zip(before, results[0]):
        if old.ndim > 1:
            assert not np.array_equal(old, new)  # all kernels moved
    for result in results:
        for a, b in zip(results[0], result):
            np.testing.assert_array_equal(a, b)


def test_the_real_networks_begin_like_bicubic_learn_an_image_and_upscale_it(
    vgg_weights, short_networks, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(model, "discriminator", tiny.discriminator)  # the test above has the real one
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "VALIDATION_SIDE", 16)
    image = make_image(0, 96, 96)
    photos = tmp_path / "photos"
    for part in ("train", "valid"):
        (photos / part).mkdir(parents=True)
        Image.fromarray(image).save(photos / part / "a.png")
    run_dir = tmp_path / "my run"
    flags = "--PREGENSTEPS 30 --STEPS 1 --BATCH_SIZE 1 --ema 0 --lr_pre_gen 1e-3 --save_every 1000 --eval_every 1000"
    flags = [*flags.split(), "--vgg_layer", "block2_conv2", "--vgg_weights", vgg_weights]
    assert run(*training(photos, run_dir, *flags)) == 0
    pretrain = curves(run_dir, "pretrain")
    # At first it upscales like bicubic, in the middle of the image, where validation looks.
    bicubic = data.bicubic(data.degrade(image)[4:20, 4:20])
    assert pretrain["PSNR"][0][1] == pytest.approx(losses.psnr(bicubic, image[16:80, 16:80]), abs=0.3)
    history = [value for _, value in pretrain["MSE Loss"]]
    assert np.mean(history[-5:]) < 0.6 * np.mean(history[:5])
    assert steps(curves(run_dir, "gan")["Perceptual Loss"]) == [1]
    Image.fromarray(make_image(0, 28, 20)).save(tmp_path / "a.png")
    last_line = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(last_line.partition("main.py ")[2])
    assert run(*words, "--input", tmp_path / "a.png", "--output", tmp_path / "b.png") == 0
    assert Image.open(tmp_path / "b.png").size == (112, 80)


@pytest.mark.parametrize(("save_every", "step"), [(1000, 10), (1, 7)])
def test_numbers_that_are_not_finite_stop_the_run_and_are_not_saved(tiny_networks, photos, tmp_path, save_every, step):
    """The loss is looked at in every tenth step, and the weights whenever they are saved."""
    argv = training(photos, tmp_path, "--STEPS", 0, "--save_every", save_every, "--PREGENSTEPS")
    assert run(*argv, 5) == 0
    args = main.parse([*argv, "40"])
    args.lr_pre_gen = 1e30  # more than the flag takes
    with pytest.raises(data.UserError, match=f"^pretrain: not finite after step {step}, not saved: "):
        train.train(args)
    assert newest(tmp_path, "pretrain") < step


# ---- Runs that end and go on ----


def test_a_finished_run_is_not_trained_again_and_more_steps_extend_it(finished, whole, photos, capsys):
    for name in (SRRESNET, SRGAN):
        (finished / name).unlink()  # they are made from the checkpoints
    assert run(*training(photos, finished)) == 0
    assert "compiling" not in capsys.readouterr().out
    assert_same_files(finished, whole[0])
    assert run(*training(photos, finished, "--STEPS", 37)) == 0
    assert "instead of" not in capsys.readouterr().out  # the rate stays at a tenth
    assert steps(curves(finished, "gan")["PSNR"]) == [0, 10, 20, 30, 34, 37]


@pytest.mark.parametrize(
    ("decay", "more", "change"), [("paper", 70, "from 1e-05 to 0.0001"), ("cosine", 40, "from 0 to 5.4e-06")]
)
def test_more_steps_say_where_the_learning_rate_rises(finished, photos, monkeypatch, capsys, decay, more, change):
    assert run(*training(photos, finished, "--lr_decay", decay)) == 0  # of which the finished run keeps a note
    monkeypatch.setattr(train, "fit", stop)
    with pytest.raises(Stopped):
        run(*training(photos, finished, "--lr_decay", decay, "--STEPS", more))
    line = f"gan: {more} steps instead of 34: at step 34, the learning rate changes {change}\n"
    assert line in capsys.readouterr().out


class Stopped(Exception):
    pass


def stop(*args, **kwargs):
    raise Stopped


def test_another_number_of_cores_is_a_warning(finished, photos, monkeypatch, capsys):
    monkeypatch.setattr(train, "count_cores", lambda: 99)
    assert run(*training(photos, finished)) == 0
    assert f"Warning: {finished} was begun on " in capsys.readouterr().err
    assert run(*training(photos, finished)) == 0
    assert capsys.readouterr().err == ""


def test_finish_goes_on_with_the_content_loss_alone(finished, photos, capsys):
    before = (finished / SRGAN).read_bytes()
    flags = ("--finish", 6)
    assert run(*training(photos, finished, *flags)) == 0
    assert "finish: compiling" in capsys.readouterr().out
    assert (finished / "gan.weights.h5").read_bytes() == before
    assert (finished / SRGAN).read_bytes() != before
    found = curves(finished, "finish")
    assert steps(found["PSNR"]) == [0, 6]
    assert "D(SR)" not in found
    assert run(*training(photos, finished, *flags)) == 0
    assert "compiling" not in capsys.readouterr().out
    for flag, old, new in (("--STEPS", 34, 50), ("--colour", 0.0, 1.0)):
        line = refusal(capsys, *training(photos, finished, *flags, flag, new), started=True)
        assert line.startswith(f"main.py: {finished} was begun with {flag} {old}, not {new}: ")


def test_the_readmes_command_fine_tunes(tiny_networks, whole, photos, tmp_path):
    readme = Path(__file__).parents[1].joinpath("README.md").read_text()
    (command,) = re.findall(r"```\npython3 main.py ([^`]*--run_dir runs/tuned[^`]*)```", readme)
    command = command.replace("\\\n", " ").replace("FOLDER", str(photos))
    command = re.sub(r" [1-9]\d+\b", " 6", command)  # fewer steps of fewer patches
    folders = ["--run_dir", tmp_path, "--cache_dir", photos.with_name("cache"), "--weights", whole[0] / SRGAN]
    assert run(*shlex.split(command), *folders) == 0
    assert not (tmp_path / SRRESNET).exists()
    assert (tmp_path / SRGAN).read_bytes() != (whole[0] / SRGAN).read_bytes()


def test_what_may_not_change_when_a_run_goes_on(finished, photos, tmp_path, capsys):
    moved = shutil.copytree(photos, tmp_path / "moved", copy_function=shutil.copy)  # the same at another place and time
    assert run(*training(moved, finished, "--lr_gen", 1e-5, "--save_every", 7)) == 0
    gans = [("--adversarial", "0.5"), ("--colour", "1.0"), ("--vgg_layer", "block2_conv2")]
    others = [("--PREGENSTEPS", 40), ("--BATCH_SIZE", 8), ("--ema", "0.0"), ("--seed", 4), ("--jpeg", "70-70")]
    for flag, value in (*gans, *others):
        line = refusal(capsys, *training(photos, finished, flag, value), started=True)
        assert re.match(f"main.py: {finished} was begun with {flag} .*, not {value}: use the same, ", line)
    shutil.copy(moved / "valid" / "4.png", moved / "train" / "0.png")
    line = refusal(capsys, *training(moved, finished), started=True)
    assert line.startswith(f"main.py: {finished} was begun with other images: ")
    shutil.rmtree(finished / "checkpoints" / "gan")  # before the GAN has begun, its flags may change
    words = [word for pair in gans for word in pair]
    assert run(*training(photos, finished, "--STEPS", 1, *words)) == 0


@pytest.fixture
def signal_at(monkeypatch):
    """`signal_at(phase, step, number)`: this process gets a signal once the run has saved this step, or a later one."""

    def signal_at(phase, step, number):
        save = train.save

        def save_and_signal(checkpoint, folder, saved_step):
            save(checkpoint, folder, saved_step)
            if folder.name == phase and saved_step >= step:
                monkeypatch.setattr(train, "save", save)
                os.kill(os.getpid(), number)

        monkeypatch.setattr(train, "save", save_and_signal)

    return signal_at


@pytest.fixture
def interrupt(signal_at, capsys):
    """`interrupt(argv, phase, step, number)`: interrupt a training. Returns its last line."""

    def interrupt(argv, phase, step, number):
        signal_at(phase, step, number)
        with pytest.raises(SystemExit) as stop:
            run(*argv)
        assert stop.value.code == 128 + number
        return capsys.readouterr().out.splitlines()[-1]

    return interrupt


def test_a_run_that_signals_interrupt_ends_like_one_that_is_not(
    tiny_networks, whole, photos, tmp_path, signal_at, interrupt
):
    argv = training(photos, tmp_path)
    line = "Interrupted and saved at step {}: the same command continues"
    assert interrupt(argv, "pretrain", 4, signal.SIGHUP) == line.format(5)
    assert interrupt(argv, "gan", 4, signal.SIGTERM) == line.format(5)
    assert interrupt(argv, "gan", 20, signal.SIGUSR1) == line.format(21)
    assert newest(tmp_path, "gan") == 21
    assert not (tmp_path / SRGAN).exists()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does, and nothing stops
    signal_at("gan", 22, signal.SIGHUP)
    assert run(*argv) == 0
    assert_same_files(tmp_path, whole[0])


def test_the_loop_of_a_gpu_trains_like_single_steps(tiny_networks, whole, photos, tmp_path, monkeypatch, interrupt):
    """From a checkpoint within ten steps, to a number of steps that is no multiple of ten, and interrupted."""
    argv = training(photos, tmp_path)
    assert run(*argv, "--PREGENSTEPS", 13, "--STEPS", 0) == 0
    monkeypatch.setattr(train, "LOOP_ON_CPU", True)
    interrupt(argv, "gan", 10, signal.SIGINT)
    assert newest(tmp_path, "gan") == 20
    assert run(*argv) == 0
    assert_nearly_same(tmp_path, whole[0])
    for phase in ("pretrain", "gan"):
        ours = curves(tmp_path, phase)
        for tag, theirs in curves(whole[0], phase).items():
            if not tag.startswith("crop"):
                points = [point for point in ours[tag] if point[0] != 13]  # the end of the first command
                np.testing.assert_allclose(points, theirs, rtol=1e-3)


@pytest.mark.parametrize("damage", ["flipped byte", "half", "empty index"])
def test_a_damaged_checkpoint_is_passed_over(finished, whole, photos, capsys, damage):
    """As a power cut, a full disk or a bad one leave it."""
    file = finished / "checkpoints" / "gan" / "0000034.data-00000-of-00001"
    content = bytearray(file.read_bytes())
    if damage == "half":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 255
    file.write_bytes(content)
    if damage == "empty index":
        file.with_name("0000034.index").write_bytes(b"")
    (finished / SRGAN).unlink()
    assert run(*training(photos, finished)) == 0
    assert_same_files(finished, whole[0])
    printed = capsys.readouterr()
    assert printed.err.startswith(f"Warning: the checkpoint {file.with_name('0000034.index')} is damaged")
    assert "gan: 32 of 34 steps are done" in printed.out


# ---- What stops a run ----


def test_a_run_that_another_process_trains_is_refused(finished, photos, capsys):
    with data.lock(finished, wait=False):
        line = refusal(capsys, *training(photos, finished), started=True)
    assert line.startswith(f"main.py: another process uses {finished}: ")


@pytest.mark.parametrize("config", ["nonsense", '{"cluster": {"worker": ["127.0.0.1:1"]}}'])
def test_a_wrong_tf_config_is_refused(finished, photos, monkeypatch, capsys, config):
    monkeypatch.setenv("TF_CONFIG", config)
    line = refusal(capsys, *training(photos, finished), started=True)
    assert line.startswith("main.py: TF_CONFIG doesn't name the workers and which of them this is: ")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (tf.errors.ResourceExhaustedError, "out of memory (lower --BATCH_SIZE) or disk: OOM, or a closed socket\n"),
        (tf.errors.UnavailableError, "another worker is gone: "),
    ],
)
def test_what_stops_a_run_is_one_line(finished, photos, monkeypatch, capsys, error, words):
    def fail():
        raise error(None, None, "OOM, or a closed socket\nand more")

    monkeypatch.setattr(model, "discriminator", fail)
    line = refusal(capsys, *training(photos, finished), started=True)
    assert line.startswith(f"main.py: {words}")


def test_a_phase_whose_checkpoints_are_all_damaged_is_refused(finished, photos, capsys):
    for file in finished.glob("checkpoints/gan/*.index"):
        file.write_bytes(b"")
    assert run(*training(photos, finished)) == 1
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith(f"main.py: all checkpoints in {finished}/checkpoints/gan are damaged: ")


# ---- Other processes ----


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
    assert_same_files(killed, whole[0])
    assert_same_curves(killed, whole[0])


@pytest.mark.slow
def test_the_real_networks_killed_twenty_times_a_phase(start, tmp_path, vgg_weights):
    """At random moments, many of which lie in writing a checkpoint."""
    flags = "--PREGENSTEPS 150 --STEPS 150 --eval_every 30 --vgg_layer block2_conv2 --vgg_weights"
    flags = [*flags.split(), vgg_weights]
    start_real = functools.partial(start, real_networks=True)
    whole = tmp_path / "whole"
    finish(start_real(whole, *flags), timeout=3600)
    killed = tmp_path / "killed"
    rng = random.Random(0)
    for phase in ["pretrain"] * 20 + ["gan"] * 20:
        kill(start_real(killed, *flags), killed, phase, rng.uniform(0, 1))
    finish(start_real(killed, *flags), timeout=3600)
    assert_same_files(killed, whole)
    assert_same_curves(killed, whole)


def test_two_devices_and_two_workers_train_like_one(runs, whole):
    folder, processes = runs
    for name in ("devices", "workers"):
        for process in processes[name]:
            finish(process)
        assert_nearly_same(folder / name, whole[0])
    chief, other = processes["workers"]
    assert "PSNR" in chief.output.read_text()
    assert "PSNR" not in other.output.read_text()
    assert len(list(folder.glob("workers/logs/gan/*.v2"))) == 1  # the chief's


def test_the_release_recipe_on_two_devices_trains_like_on_one(runs):
    folder, processes = runs
    for name in ("recipe", "recipe on two"):
        assert "finish 6/6: " in finish(*processes[name])
    assert_nearly_same(folder / "recipe on two", folder / "recipe")


def test_a_batch_that_devices_can_not_share_is_refused(runs):
    _, processes = runs
    output = finish(*processes["odd"], code=1)
    assert output.splitlines()[-1] == "main.py: --BATCH_SIZE must be a multiple of the 2 devices"


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
