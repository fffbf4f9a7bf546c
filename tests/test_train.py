"""Training: what a step moves, and a run that is cut off and goes on."""

import argparse
import os
import shutil
import signal
import time
from types import SimpleNamespace

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from conftest import make_image
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

import data
import losses
import main
import model
import train


@pytest.fixture
def tiny_networks(monkeypatch, tmp_path):
    tiny.use(monkeypatch.setattr, tmp_path)


def argv(photos, run_dir, *more):
    common = "--BATCH_SIZE 4 --PREGENSTEPS 12 --STEPS 8 --save_every 5 --eval_every 4".split()
    return ["--data_dir", str(photos), "--run_dir", str(run_dir), *common, *more]


def flags(*args):
    return main.parse(argv(*args))


def batch(size=2):
    hr = np.stack([make_image(seed, 96, 96) for seed in range(size)])
    return np.stack([data.degrade(image) for image in hr]), hr


def values(network):
    return [w.copy() for w in network.get_weights()]


def equal(before, after):
    return [np.array_equal(a, b) for a, b in zip(before, after)]


def test_gan_step_moves_both_networks_and_never_vgg():
    generator, discriminator, vgg = tiny.generator(), tiny.discriminator(), tiny.vgg_features()
    optimizers = [train.make_optimizer(1e-3, network) for network in (generator, discriminator)]
    step = train.make_gan_step(generator, discriminator, vgg, *optimizers)
    before = [values(network) for network in (generator, discriminator, vgg)]
    scalars = step(*batch())
    generator_kept, discriminator_kept, vgg_kept = (
        equal(b, values(n)) for b, n in zip(before, (generator, discriminator, vgg))
    )
    assert all(vgg_kept) and not any(discriminator_kept) and not any(generator_kept)
    assert set(scalars) == {
        "Perceptual Loss", "Discriminator Loss", "Content Loss", "Adversarial Loss", "Colour Loss", "Artifact Loss",
        "D(HR)", "D(SR)",
    }  # fmt: skip


@pytest.mark.parametrize("frozen", ["generator", "discriminator"])
def test_each_loss_moves_its_own_network_only(frozen):
    """With one network's learning rate at 0, only the statistics of its normalisation move."""
    generator, discriminator, vgg = tiny.generator(), tiny.discriminator(), tiny.vgg_features()
    rates = {"generator": 1e-3, "discriminator": 1e-3, frozen: 0.0}
    optimizers = [train.make_optimizer(rates[network.name], network) for network in (generator, discriminator)]
    step = train.make_gan_step(generator, discriminator, vgg, *optimizers)
    before = {network.name: [v.numpy() for v in network.trainable_variables] for network in (generator, discriminator)}
    step(*batch())
    for network in (generator, discriminator):
        kept = equal(before[network.name], [v.numpy() for v in network.trainable_variables])
        assert all(kept) if network.name == frozen else not any(kept)


def test_gan_step_reports_the_papers_losses():
    generator, discriminator, vgg = tiny.generator(), tiny.discriminator(), tiny.vgg_features()
    lr, hr = (tf.cast(x, tf.float32) for x in batch())
    sr, logits_hr = generator(lr, training=True), discriminator(hr, training=True)
    logits_sr = discriminator(sr, training=True)
    content = float(losses.content_loss(vgg(hr), vgg(sr)))
    adversarial = float(losses.adversarial_loss(logits_sr))
    colour, artifact = float(losses.colour_loss(hr, sr)), float(losses.artifact_loss(hr, sr))
    optimizers = [train.make_optimizer(1e-3, network) for network in (generator, discriminator)]
    scalars = train.make_gan_step(generator, discriminator, vgg, *optimizers)(*batch())
    assert float(scalars["Content Loss"]) == pytest.approx(content, rel=1e-4)
    assert float(scalars["Colour Loss"]) == pytest.approx(colour, rel=1e-4)
    assert float(scalars["Artifact Loss"]) == pytest.approx(artifact, rel=1e-4)
    perceptual = content + 3e-3 * adversarial + 10 * colour + 32 * artifact
    assert float(scalars["Perceptual Loss"]) == pytest.approx(perceptual, rel=1e-4)
    assert float(scalars["Discriminator Loss"]) == pytest.approx(
        float(losses.discriminator_loss(logits_hr, logits_sr)), rel=1e-4
    )
    assert float(scalars["D(HR)"]) == pytest.approx(float(tf.reduce_mean(tf.sigmoid(logits_hr))), rel=1e-4)


def test_pretraining_overfits_one_batch(monkeypatch):
    monkeypatch.setattr(model, "BLOCKS", 2)
    keras.utils.set_random_seed(0)
    generator = model.generator()
    step = train.make_pretrain_step(generator, train.make_optimizer(1e-3, generator))
    lr, hr = batch(1)
    history = [float(step(lr[:, :12, :12], hr[:, :48, :48])["MSE Loss"]) for _ in range(60)]
    assert history[-1] < 0.5 * history[0]


def test_adam_is_kerass():
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(5, 3)), [tf.constant(rng.normal(size=(5, 3)), tf.float32) for _ in range(4)]
    schedule = train.make_schedule("cosine", 1e-2, 4)
    networks = [keras.Variable(start, dtype="float32") for _ in range(2)]
    for variable, kind in zip(networks, (keras.optimizers.Adam, train.Adam)):
        optimizer = kind(schedule, beta_1=0.9)
        for gradient in gradients:
            optimizer.apply([gradient], [variable])
    assert abs(networks[0] - start).numpy().min() > 1e-3
    np.testing.assert_allclose(networks[1], networks[0], rtol=1e-5)


def test_schedules():
    paper = train.make_schedule("paper", 1e-4, 100, drop=True)
    assert [float(paper(step)) for step in (0, 49, 50, 99)] == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])
    assert float(train.make_schedule("paper", 1e-4, 100)(99)) == pytest.approx(1e-4)
    assert float(train.make_schedule("none", 1e-4, 100, drop=True)(99)) == pytest.approx(1e-4)
    cosine = train.make_schedule("cosine", 1e-3, 100)
    assert [float(cosine(step)) for step in (0, 50, 100)] == pytest.approx([1e-3, 5e-4, 0], abs=1e-9)


def test_ema_averages_the_weights_and_measures_their_statistics(tiny_networks, photos):
    images, _ = data.load(photos)
    args = argparse.Namespace(ema=0.5, precision="float32", seed=0, jpeg=None)
    generator = model.generator()
    optimizer = train.make_optimizer(1e-2, generator, ema=0.5)
    average = train.make_averaging(generator, optimizer, images, args)
    assert all(equal(values(generator), values(average())))  # no step yet
    step = train.make_pretrain_step(generator, optimizer)
    history = []
    for _ in range(3):
        step(*batch())
        history.append([v.numpy() for v in generator.trainable_variables])
    averaged = average()
    for i, variable in enumerate(averaged.trainable_variables):
        expected = 0.25 * history[0][i] + 0.25 * history[1][i] + 0.5 * history[2][i]
        np.testing.assert_allclose(variable, expected, rtol=1e-4, atol=1e-6)
    assert all(equal(history[2], [v.numpy() for v in generator.trainable_variables]))
    # The normalisation's input has the mean and variance that its statistics say.
    lrs = np.concatenate([lr for lr, _ in data.patches(images, 16, 0, 16, seed=0)])
    features = keras.Model(averaged.input, averaged.layers[2].output)(lrs).numpy()
    mean, variance = averaged.layers[3].moving_mean, averaged.layers[3].moving_variance
    np.testing.assert_allclose(mean, features.mean((0, 1, 2)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(variance, features.var((0, 1, 2)), rtol=0.2)  # between batches means differ, too


def test_validation_looks_at_fixed_aligned_crops(photos, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    monkeypatch.setattr(train, "VALID_SIZE", 16)
    pairs = train.validation_pairs(data.load(photos)[1])
    assert [(lr.shape, hr.shape) for lr, hr in pairs] == [((16, 16, 3), (64, 64, 3))] * 2
    for lr, hr in pairs:
        difference = np.abs(data.degrade(hr)[4:-4, 4:-4].astype(int) - lr[4:-4, 4:-4])
        assert difference.max() == 0


def points(logs):
    """{(tag, step): value or True} of what TensorBoard shows; fails on a point that stands there twice."""
    events = EventAccumulator(str(logs), size_guidance={"tensors": 0})  # 0: all of them
    events.Reload()
    found = {}
    for tag in events.Tags()["tensors"]:
        for event in events.Tensors(tag):
            assert (tag, event.step) not in found, "a point is drawn twice"
            tensor = tf.make_ndarray(event.tensor_proto)
            found[tag, event.step] = float(tensor) if tensor.shape == () else True
    return found


def step_of(checkpoint):
    return int(checkpoint.name.rpartition("-")[2])


def weights(path):
    """All arrays of a weights file."""
    arrays = []
    with h5py.File(path) as file:
        file.visititems(lambda name, item: arrays.append(item[()]) if isinstance(item, h5py.Dataset) else None)
    return arrays


def same_result(run, other):
    """Whether two runs left the same weights, to the last bit, and drew the same curves."""
    for name in ("srresnet", "srgan"):
        assert all(equal(weights(run / f"{name}.weights.h5"), weights(other / f"{name}.weights.h5")))
    for phase in ("pretrain", "gan"):
        assert points(run / "logs" / phase) == points(other / "logs" / phase)


@pytest.mark.parametrize("ema, cut_off_after", [("0", (7,)), ("0.9", (5, 12 + 2, 12 + 7))])
def test_a_run_that_was_cut_off_ends_like_one_that_was_not(
    tiny_networks, photos, tmp_path, monkeypatch, cut_off_after, ema
):
    """The process dies in the middle of a step; the same command, again, gives the same weights and curves."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.train(flags(photos, whole, "--ema", ema))

    class Killed(BaseException):
        pass

    def dying(make, done):
        def make_step(**parts):
            step = make(**parts)

            def counted(lr, hr):
                done.append(1)
                if len(done) == dies_after + 1:
                    raise Killed
                return step(lr, hr)

            return counted

        return make_step

    makers = {name: getattr(train, name) for name in ("make_pretrain_step", "make_gan_step")}
    for limit in cut_off_after:
        saved = [(p.name.startswith("gan"), step_of(p)) for p in (cut / "checkpoints").glob("*-*")]
        already = max([12 * gan + step for gan, step in saved], default=0)
        done, dies_after = [], limit - already
        for name, make in makers.items():
            monkeypatch.setattr(train, name, dying(make, done))
        with pytest.raises(Killed):
            train.train(flags(photos, cut, "--ema", ema))
        time.sleep(1)  # TensorBoard reads the logs in the order of the seconds in which they were begun
    for name, make in makers.items():
        monkeypatch.setattr(train, name, make)
    train.train(flags(photos, cut, "--ema", ema))

    same_result(cut, whole)


def test_curves_and_images_of_a_run(tiny_networks, photos, tmp_path):
    train.train(flags(photos, tmp_path / "run"))
    pretrain, gan = (points(tmp_path / "run" / "logs" / phase) for phase in ("pretrain", "gan"))
    images = {"crop/bicubic", "crop/SR", "crop/HR"}
    assert {tag for tag, _ in pretrain} == {"MSE Loss", "PSNR"} | images
    assert {tag for tag, _ in gan} == {
        "Perceptual Loss", "Discriminator Loss", "Content Loss", "Adversarial Loss", "Colour Loss", "Artifact Loss",
        "D(HR)", "D(SR)", "PSNR", "Validation Content Loss",
    } | images  # fmt: skip
    assert [step for tag, step in pretrain if tag == "PSNR"] == [0, 4, 8, 12]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "gan-0000005", "gan-0000008", "pretrain-0000010", "pretrain-0000012",
    ]  # fmt: skip


def test_more_steps_extend_a_finished_run(tiny_networks, photos, tmp_path, capsys):
    train.train(flags(photos, tmp_path / "run"))
    capsys.readouterr()
    train.train(flags(photos, tmp_path / "run", "--STEPS", "11"))
    assert "gan: continuing after step 8" in capsys.readouterr().out
    assert max(step for tag, step in points(tmp_path / "run" / "logs" / "gan")) == 11


def test_other_options_are_refused_and_other_learning_rates_are_not(
    tiny_networks, photos, tmp_path, capsys, monkeypatch
):
    run = tmp_path / "run"
    monkeypatch.chdir(photos)
    train.train(flags(".", run, "--STEPS", "0"))
    monkeypatch.chdir(tmp_path)
    assert main.main(argv(".", run)) == 2
    assert f"was started with --data_dir {photos}, not" in capsys.readouterr().err
    assert main.main(argv(photos, run, "--BATCH_SIZE", "8")) == 2
    assert "was started with --BATCH_SIZE 4, not with --BATCH_SIZE 8" in capsys.readouterr().err
    train.train(flags(photos, run, "--PREGENSTEPS", "14", "--STEPS", "0", "--lr_pre_gen", "1e-5"))


def test_damaged_checkpoint_is_passed_over(tiny_networks, photos, tmp_path, capsys):
    run = tmp_path / "run"
    train.train(flags(photos, run, "--STEPS", "0"))
    before = weights(run / "srresnet.weights.h5")
    newest = run / "checkpoints" / "pretrain-0000012" / "state.data-00000-of-00001"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 255
    newest.write_bytes(content)
    train.train(flags(photos, run, "--STEPS", "0"))
    captured = capsys.readouterr()
    assert "is damaged" in captured.err and "continuing after step 10" in captured.out
    assert all(equal(before, weights(run / "srresnet.weights.h5")))


def test_loss_that_is_not_finite_stops_the_run(tiny_networks, photos, tmp_path):
    args = flags(photos, tmp_path / "run", "--lr_decay", "none")
    args.lr_pre_gen = 1e30
    with pytest.raises(FloatingPointError, match="after step 4.*last good checkpoint.*lower learning rate"):
        train.train(args)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_go_on(tiny_networks, photos, tmp_path, monkeypatch, capsys, number):
    make = train.make_pretrain_step

    def interrupted(**parts):
        step, done = make(**parts), []

        def counted(lr, hr):
            done.append(1)
            if len(done) == 7:
                os.kill(os.getpid(), number)
            return step(lr, hr)

        return counted

    monkeypatch.setattr(train, "make_pretrain_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        train.train(flags(photos, tmp_path / "run"))
    assert stop.value.code == 128 + number
    assert "the same command continues from" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "pretrain-0000007").is_dir()


def test_signal_after_the_last_step_ends_the_program_too(tiny_networks, photos, tmp_path, monkeypatch):
    save = train.save_weights

    def interrupted(generator, path):
        os.kill(os.getpid(), signal.SIGINT)
        save(generator, path)

    monkeypatch.setattr(train, "save_weights", interrupted)
    with pytest.raises(SystemExit) as stop:
        train.train(flags(photos, tmp_path))
    assert stop.value.code == 130 and (tmp_path / "srresnet.weights.h5").exists()
    assert (tmp_path / "checkpoints" / "pretrain-0000012").is_dir() and not list(tmp_path.glob("checkpoints/gan-*"))


def test_a_checkpoint_is_never_written_with_a_number_that_is_not_finite(tiny_networks, photos, tmp_path, monkeypatch):
    """The loss of the step that breaks the weights is still finite."""
    make = train.make_pretrain_step

    def breaking(generator, optimizer):
        step, done = make(generator, optimizer), []

        def counted(lr, hr):
            done.append(1)
            scalars = step(lr, hr)
            if len(done) == 10:
                generator.trainable_variables[0].assign(generator.trainable_variables[0] * np.nan)
            return scalars

        return counted

    monkeypatch.setattr(train, "make_pretrain_step", breaking)
    with pytest.raises(
        FloatingPointError, match="a loss or a weight is not finite after step 10; last good.*pretrain-0000005"
    ):
        train.train(flags(photos, tmp_path))
    assert max(step_of(path) for path in (tmp_path / "checkpoints").iterdir()) == 5


@pytest.mark.parametrize("d_hr, warnings", [(0.99, 1), (0.9, 0)])
def test_a_discriminator_that_has_won_is_named_once(
    tiny_networks, photos, tmp_path, monkeypatch, capsys, d_hr, warnings
):
    monkeypatch.setattr(train, "WON_AFTER", 2)
    names = ["Perceptual Loss", "Discriminator Loss", "Content Loss", "Adversarial Loss"]
    scalars = {**dict.fromkeys(names, 0.1), "D(HR)": d_hr, "D(SR)": 0.01}
    monkeypatch.setattr(train, "make_gan_step", lambda **parts: lambda lr, hr: scalars)
    train.train(flags(photos, tmp_path, "--STEPS", "100"))
    assert capsys.readouterr().err.count("the discriminator tells all images apart") == warnings


def test_checkpoints_are_minutes_apart_at_most(tiny_networks, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_AFTER", 0)
    monkeypatch.setattr(train, "KEEP", 100)
    train.train(flags(photos, tmp_path, "--STEPS", "0", "--save_every", "1000"))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 12


def test_full_disk_while_logging(tiny_networks, photos, tmp_path, monkeypatch):
    def full(self):
        raise tf.errors.ResourceExhaustedError(None, None, "logs; No space left on device\n\tFailed to flush 1 events")

    writer = train.open_logs(tmp_path, 0)
    monkeypatch.setattr(type(writer), "flush", full)
    with pytest.raises(OSError, match="can't write TensorBoard's logs.*: No space left on device$"):
        train.log(writer, 1, {"PSNR": 20.0})


def test_out_of_memory_names_the_batch_size(tiny_networks, photos, tmp_path, monkeypatch):
    def exhausted(lr, hr):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    monkeypatch.setattr(train, "make_pretrain_step", lambda **parts: exhausted)
    with pytest.raises(MemoryError, match="--BATCH_SIZE 4"):
        train.train(flags(photos, tmp_path))


def test_full_disk_keeps_the_checkpoint_before(tiny_networks, tmp_path, monkeypatch):
    network = tiny.generator()
    checkpoints = train.Checkpoints(tmp_path, "pretrain", generator=network)
    checkpoints.save(5)

    def full(path):
        (tmp_path / "pretrain.new").mkdir()
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(checkpoints.state, "write", full)
    with pytest.raises(OSError, match="intact: No space left on device$"):
        checkpoints.save(10)
    assert [path.name for path in tmp_path.iterdir()] == ["pretrain-0000005"]
    assert checkpoints.restore() == 5


@pytest.mark.parametrize("part", [0, 0.5, -1])
def test_a_checkpoint_that_was_cut_short_is_passed_over(tiny_networks, photos, tmp_path, capsys, part):
    """What a power cut or a full disk leaves of the newest one: nothing, a half, or all but one byte."""
    train.train(flags(photos, tmp_path, "--STEPS", "0"))
    before = weights(tmp_path / "srresnet.weights.h5")
    newest = tmp_path / "checkpoints" / "pretrain-0000012" / "state.data-00000-of-00001"
    os.truncate(newest, int(part * newest.stat().st_size) if part >= 0 else newest.stat().st_size - 1)
    (tmp_path / "srresnet.weights.h5").unlink()
    train.train(flags(photos, tmp_path, "--STEPS", "0"))
    captured = capsys.readouterr()
    assert "is damaged" in captured.err and "continuing after step 10" in captured.out
    assert all(equal(before, weights(tmp_path / "srresnet.weights.h5")))


def test_if_all_checkpoints_are_damaged_the_run_stops(tiny_networks, photos, tmp_path):
    train.train(flags(photos, tmp_path, "--STEPS", "0"))
    for file in tmp_path.glob("checkpoints/*/state.index"):
        file.write_bytes(b"")
    with pytest.raises(OSError, match="no intact checkpoint among .*pretrain-\\*: remove"):
        train.train(flags(photos, tmp_path, "--STEPS", "0"))


def test_foreign_files_beside_the_checkpoints_are_left_alone(tiny_networks, photos, tmp_path):
    names = ["pretrain-x1", "pretrain-1", "gan-", "notes.txt", "pretrain-0000099"]
    (tmp_path / "checkpoints").mkdir()
    for name in names:
        (tmp_path / "checkpoints" / name).write_text("mine")
    train.train(flags(photos, tmp_path))
    assert all((tmp_path / "checkpoints" / name).read_text() == "mine" for name in names)


def test_a_finished_phase_is_neither_trained_nor_announced_again(tiny_networks, photos, tmp_path, capsys):
    train.train(flags(photos, tmp_path, "--STEPS", "0"))
    file = tmp_path / "srresnet.weights.h5"
    before = file.stat()
    assert "To upscale: " in capsys.readouterr().out
    train.train(flags(photos, tmp_path))
    assert file.stat().st_ino == before.st_ino and file.stat().st_mtime_ns == before.st_mtime_ns
    assert capsys.readouterr().out.count("To upscale: ") == 1  # with SRGAN
    srgan = weights(tmp_path / "srgan.weights.h5")
    (tmp_path / "srgan.weights.h5").unlink()
    train.train(flags(photos, tmp_path))
    assert all(equal(srgan, weights(tmp_path / "srgan.weights.h5")))


def test_two_runs_in_one_folder(tiny_networks, photos, tmp_path, monkeypatch):
    def second(*args):
        with pytest.raises(OSError, match="another process is using"):
            train.train(flags(photos, tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", second)
    with pytest.raises(KeyboardInterrupt):
        train.train(flags(photos, tmp_path))


def test_a_batch_that_the_devices_cannot_share_is_refused(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "make_strategy", lambda: SimpleNamespace(num_replicas_in_sync=3))
    with pytest.raises(ValueError, match="--BATCH_SIZE 4 must be a multiple of the number of devices, 3"):
        train.train(flags(photos, tmp_path))


def test_a_worker_that_is_gone_is_one_clear_line(tiny_networks, photos, tmp_path, monkeypatch):
    def lost(*args):
        raise tf.errors.UnavailableError(None, None, "Socket closed\nAdditional GRPC error information")

    monkeypatch.setattr(train, "fit", lost)
    with pytest.raises(OSError, match="^another worker is gone: start the same command .* last checkpoint$"):
        train.train(flags(photos, tmp_path))


@pytest.mark.parametrize("config", ["nonsense", "[]", '{"cluster": {"worker": ["127.0.0.1:1"]}}'])
def test_a_wrong_tf_config_is_one_clear_line(monkeypatch, config):
    monkeypatch.setenv("TF_CONFIG", config)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    with pytest.raises(ValueError, match="TF_CONFIG doesn't name the workers"):
        train.make_strategy()


def test_changed_images_are_named(tiny_networks, photos, tmp_path, capsys):
    folder = shutil.copytree(photos, tmp_path / "photos")
    train.train(flags(folder, tmp_path / "run", "--STEPS", "0"))
    train.train(flags(folder, tmp_path / "run", "--STEPS", "0"))
    assert "have changed" not in capsys.readouterr().err
    shutil.copy(folder / "valid" / "4.png", folder / "train")
    train.train(flags(folder, tmp_path / "run", "--STEPS", "0"))
    assert "Warning: the training images have changed since this run began" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- the real networks


def state_after(step, start, variables, lr, hr):
    for variable, value in zip(variables, start):
        variable.assign(value)
    step(lr, hr)
    return [variable.numpy() for variable in variables]


def test_a_gan_step_of_the_real_networks_repeats_to_the_bit(vgg_weights, monkeypatch):
    """Five times from one state. A sum of three gradients, whose order depends on timing, often shows in this."""
    monkeypatch.setattr(model, "BLOCKS", 2)  # all of them are alike
    keras.utils.set_random_seed(0)
    generator, discriminator = model.generator(), model.discriminator()
    vgg = losses.vgg_features("block2_conv2", vgg_weights)
    optimizers = [train.make_optimizer(1e-4, network) for network in (generator, discriminator)]
    step = train.make_gan_step(generator, discriminator, vgg, *optimizers)
    nodes = step.get_concrete_function(*map(tf.constant, batch(2))).graph.as_graph_def().node
    assert max(len(node.input) for node in nodes if node.op == "AddN") == 2
    variables = [v for part in (generator, discriminator, *optimizers) for v in part.variables]
    start = [variable.numpy() for variable in variables]
    reference = state_after(step, start, variables, *batch(2))
    for _ in range(4):
        assert all(equal(reference, state_after(step, start, variables, *batch(2))))
