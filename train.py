"""Training: SRResNet with MSE, then SRGAN with the perceptual loss (Ledig et al. 2017, section 3.2).

From top to bottom: the devices, the two training steps, validation and weights, checkpoints and logs, and the loop.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

import data
import losses
import model

LOG_EVERY = 10  # steps between TensorBoard's points: reading a loss waits for the device
KEEP = 2  # newest checkpoints of a phase
SAVE_AFTER = 300  # at most this many seconds between checkpoints, however long --save_every steps take
WON_AFTER = 50  # points of D(HR) near 1 and D(SR) near 0 before the warning
VALID_IMAGES, VALID_SIZE = 10, 96  # validation crops: the middle 96x96 LR pixels of the first ten images


# ------------------------------------------------------------------------------------------------------- the devices


def make_strategy() -> tf.distribute.Strategy:
    """All GPUs of this machine, or of all machines that TF_CONFIG names; else one device. Raises ValueError."""
    if config := os.environ.get("TF_CONFIG"):
        try:
            workers = [address for job in json.loads(config)["cluster"].values() for address in job]
            print(f"Waiting for all workers of TF_CONFIG: {', '.join(workers)}", flush=True)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would not run while TensorFlow waits
            return tf.distribute.MultiWorkerMirroredStrategy()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"TF_CONFIG doesn't name the workers and which of them this is: {error}") from error
    if len(tf.config.list_physical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


def is_chief() -> bool:
    """Whether this process writes and validates: of several workers, one does."""
    return tf.distribute.get_strategy().extended.should_checkpoint


def check_same_step(step: int):
    """Wait for the other workers. Raises ValueError, in all of them, if they are at different steps."""
    strategy = tf.distribute.get_strategy()

    @tf.function
    def sums():
        return strategy.reduce("SUM", strategy.run(lambda: tf.constant([step, step**2], tf.int64)), axis=None)

    total, squares = sums().numpy().tolist()
    if total**2 != squares * strategy.num_replicas_in_sync:  # equal only if all steps are
        raise ValueError("the workers see different checkpoints: --run_dir must be a folder that all of them share")


# --------------------------------------------------------------------------------------------------------- the steps


def compiled(step: Callable, xla: bool | None = None) -> Callable:
    """Compile `step(lr, hr) -> dict of scalars` into one function of a uint8 batch, on all devices.

    `xla=None`: only on a single GPU. XLA doesn't work with tf.distribute, and on a CPU oneDNN's kernels in a plain
    graph are faster.
    """
    if xla is None:
        xla = bool(tf.config.list_physical_devices("GPU"))
    # A gradient is a sum over the uses of a tensor. TensorFlow adds three or more terms in an order that depends on
    # timing, and its arithmetic optimizer merges nested sums of two into one of three. With that off, and no tensor
    # used more than twice, equal runs end with equal bits.
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})

    strategy = tf.distribute.get_strategy()

    def cast(lr, hr):
        return step(tf.cast(lr, tf.float32), tf.cast(hr, tf.float32))

    def everywhere(lr, hr):
        scalars = strategy.run(cast, (lr, hr))
        return {name: strategy.reduce("MEAN", value, axis=None) for name, value in scalars.items()}

    return tf.function(everywhere, autograph=False, jit_compile=xla and not tf.distribute.has_strategy())


def update(network, optimizer, tape, loss):
    """Take one optimizer step. `apply` sums gradients over devices, so each contributes its share of the mean."""
    share = tf.constant(1 / tf.distribute.get_strategy().num_replicas_in_sync)
    optimizer.apply(tape.gradient(loss, network.trainable_variables, share), network.trainable_variables)


def make_pretrain_step(generator, optimizer) -> Callable:
    """One step of SRResNet on the MSE (equation 4). Returns the compiled `step(lr, hr) -> {"MSE Loss": scalar}`."""

    def step(lr, hr):  # (batch, 24, 24, 3), (batch, 96, 96, 3)
        with tf.GradientTape() as tape:
            loss = losses.mse_loss(hr, generator(lr, training=True))
        update(generator, optimizer, tape, loss)
        return {"MSE Loss": loss}

    return compiled(step)


def make_gan_step(generator, discriminator, vgg, optimizer, discriminator_optimizer) -> Callable:
    """One step of both networks of SRGAN (equations 2 and 3), with one forward pass of each.

    Returns the compiled `step(lr, hr)`, whose scalars are the losses and the mean probabilities D(HR) and D(SR).
    """

    def step(lr, hr):
        features_hr = vgg(hr, training=False)
        with tf.GradientTape() as generator_tape, tf.GradientTape() as discriminator_tape:
            sr = generator(lr, training=True)
            sr_copy = tf.identity(sr)  # so that no tensor is used more than twice: see `compiled`
            sr_copy_2 = tf.identity(sr_copy)
            logits_hr = discriminator(hr, training=True)
            logits_sr = discriminator(sr_copy, training=True)
            # The generator's images should have the original's features and colours, no artifacts, and pass for real.
            content = losses.content_loss(features_hr, vgg(sr, training=False))
            adversarial = losses.adversarial_loss(logits_sr)
            colour = losses.colour_loss(hr, sr_copy_2)
            artifact = losses.artifact_loss(hr, sr_copy_2)
            perceptual = losses.perceptual_loss(content, adversarial, colour, artifact)
            # The discriminator should tell real images from generated ones.
            discrimination = losses.discriminator_loss(logits_hr, logits_sr)
        update(generator, optimizer, generator_tape, perceptual)
        update(discriminator, discriminator_optimizer, discriminator_tape, discrimination)
        return {
            "Perceptual Loss": perceptual,
            "Discriminator Loss": discrimination,
            "Content Loss": content,
            "Adversarial Loss": adversarial,
            "Colour Loss": colour,
            "Artifact Loss": artifact,
            "D(HR)": tf.reduce_mean(tf.sigmoid(logits_hr)),
            "D(SR)": tf.reduce_mean(tf.sigmoid(logits_sr)),
        }

    return compiled(step)


def make_schedule(name: str, learning_rate: float, steps: int, drop: bool = False):
    """The learning rate over the steps. `drop` marks the GAN, whose second half the paper trains at a tenth.

    A constant rate is a schedule, too: as a plain number, a checkpoint's rate would replace a new one.
    """
    if name == "cosine":
        return keras.optimizers.schedules.CosineDecay(learning_rate, max(1, steps))
    second = learning_rate / 10 if name == "paper" and drop else learning_rate
    last = max(0, steps // 2 - 1)  # of the first half, counted from 0
    return keras.optimizers.schedules.PiecewiseConstantDecay([last], [learning_rate, second])


class Adam(keras.optimizers.Adam):
    """Keras's, with TensorFlow's fused kernel: one pass over the weights instead of a dozen."""

    def update_step(self, gradient, variable, learning_rate):
        i, step = self._get_variable_index(variable), tf.cast(self.iterations + 1, tf.float32)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[i].value.handle,
            v=self._velocities[i].value.handle,
            beta1_power=self.beta_1**step,
            beta2_power=self.beta_2**step,
            lr=learning_rate,
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )


def make_optimizer(schedule, network, ema: float = 0.0):
    """Adam as in the paper; with `ema`, it also averages the weights over the steps."""
    optimizer = Adam(schedule, beta_1=0.9, use_ema=ema > 0, ema_momentum=ema or 0.99)
    optimizer.build(network.trainable_variables)
    return optimizer


# -------------------------------------------------------------------------------------------- validation and weights


def make_averaging(generator, optimizer, images, args) -> Callable:
    """Returns `average()`, a generator with the averages of the weights over the steps so far (--ema).

    Normalisation statistics belong to the weights that they were measured with, so the averages get their own, the
    mean over 16 batches of 16 LR patches. Without --ema, `average` returns `generator`.
    """
    if not args.ema:
        return lambda: generator
    averaged = model.generator(args.precision)
    lrs = [lr for lr, _ in data.patches(images, 16, 0, 16, args.seed, args.jpeg)]

    def average():
        averaged.set_weights(generator.get_weights())
        if optimizer.iterations.numpy():
            optimizer.finalize_variable_values(averaged.trainable_variables)
            model.measure_statistics(averaged, lrs)
        return averaged

    return average


def validation_pairs(images) -> list[tuple[np.ndarray, np.ndarray]]:
    """The middle of the first images as `(lr, hr)`: small images whole, at most 384x384 of large ones."""
    pairs = []
    for _, (lr, hr) in zip(range(VALID_IMAGES), images):
        top, left = (max(side - VALID_SIZE, 0) // 2 for side in lr.shape[:2])
        lr = lr[top:, left:][:VALID_SIZE, :VALID_SIZE]
        hr = hr[data.SCALE * top :, data.SCALE * left :][: data.SCALE * VALID_SIZE, : data.SCALE * VALID_SIZE]
        pairs.append((np.array(lr), np.array(hr)))
    return pairs


def make_validation(average, pairs, vgg=None) -> Callable:
    """Returns `validate() -> (scalars, first SR)` of the generator that `average` returns, the same object each time.

    The scalars are the mean PSNR in dB and, with `vgg`, the mean content loss.
    """
    generator = average()

    @tf.function(autograph=False, input_signature=[tf.TensorSpec((1, None, None, 3), tf.uint8)] * 2)
    def compare(lr, hr):
        sr = tf.round(tf.clip_by_value(generator(tf.cast(lr, tf.float32), training=False), 0, 255))
        content = losses.content_loss(vgg(tf.cast(hr, tf.float32)), vgg(sr)) if vgg else 0.0
        return tf.cast(sr[0], tf.uint8), content

    def validate():
        average()
        results = [compare(lr[None], hr[None]) for lr, hr in pairs]
        scalars = {"PSNR": np.mean([losses.psnr(sr.numpy(), hr) for (sr, _), (_, hr) in zip(results, pairs)])}
        if vgg:
            scalars["Validation Content Loss"] = np.mean([float(content) for _, content in results])
        return scalars, results[0][0].numpy()

    return validate


def save_weights(generator, path: Path):
    with data.atomic_write(path) as temporary:
        generator.save_weights(temporary)


# --------------------------------------------------------------------------- checkpoints, TensorBoard's logs, options


@contextlib.contextmanager
def writing(what: str):
    """Turn TensorFlow's errors of a full disk and the like into an OSError of one line."""
    try:
        yield
    except tf.errors.OpError as error:  # its message names operations and temporary files first
        reason = str(error).splitlines()[0].partition(" [Op:")[0].rpartition("; ")[2]
        raise OSError(f"can't write {what}, older checkpoints are intact: {reason}") from error


class Checkpoints:
    """The state of one phase, networks and optimizers, in folders `NAME-STEP` that are whole or not there.

    The order of the data needs no state: a batch follows from its step.
    """

    def __init__(self, folder: Path, name: str, **parts):
        self.folder, self.name, self.parts = folder, name, parts.values()
        self.state = tf.train.Checkpoint(**parts)

    def path(self, step: int) -> Path:
        return self.folder / f"{self.name}-{step:07d}"

    def all(self) -> list[Path]:
        """The checkpoints, newest first. Other names in the folder are ignored."""
        paths = sorted(self.folder.glob(f"{self.name}-{7 * '[0-9]'}"), reverse=True)
        return [path for path in paths if path.is_dir()]

    def save(self, step: int):
        """Write beside the older ones, rename, then remove all but the last few. Raises OSError."""
        path, new = self.path(step), self.folder / f"{self.name}.new"
        shutil.rmtree(new, ignore_errors=True)  # left by a run that was killed
        try:
            with writing(f"the checkpoint {path}"):
                self.state.write(str(new / "state"))
            shutil.rmtree(path, ignore_errors=True)  # damaged
            os.replace(new, path)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        for old in self.all()[KEEP:]:
            shutil.rmtree(old)

    def restore(self) -> int:
        """Restore the newest intact checkpoint. Returns its step, 0 if there is none. Raises OSError if all are bad."""
        paths = self.all()
        for path in paths:
            try:
                self.state.read(str(path / "state")).assert_consumed()
                return int(path.name.rpartition("-")[2])
            except (tf.errors.OpError, AssertionError, OSError, ValueError, IndexError) as error:
                print(f"Warning: the checkpoint {path} is damaged ({type(error).__name__})", file=sys.stderr)
        if paths:
            raise OSError(f"no intact checkpoint among {self.folder / self.name}-*: remove them to restart this phase")
        return 0

    def check_finite(self, step: int, scalars: dict, weights: bool):
        """Raise FloatingPointError if a loss or, with `weights`, a number of the state is not finite."""
        state = (variable.numpy() for part in self.parts for variable in part.variables if weights)
        if not all(np.isfinite(value).all() for value in itertools.chain(scalars.values(), state)):
            raise FloatingPointError(
                f"{self.name}: a loss or a weight is not finite after step {step}; last good checkpoint: "
                f"{next(iter(self.all()), 'none')}. Try a lower learning rate, or --precision float32"
            )


def open_logs(folder: Path, first: int):
    """TensorBoard's writer in `folder`. TensorBoard drops the points of an earlier writer from step `first` on."""
    start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
    with writing("TensorBoard's logs"):
        with tf.Graph().as_default(), tf.compat.v1.summary.FileWriter(str(folder)) as session:
            session.add_session_log(start, first)
        return tf.summary.create_file_writer(str(folder))


def log(writer, step: int, scalars: dict, **images):
    """Write scalars and images, of one crop, to TensorBoard's file."""
    with writing("TensorBoard's logs"), writer.as_default(step):
        for name, value in scalars.items():
            tf.summary.scalar(name, value)
        for name, image in images.items():
            tf.summary.image(f"crop/{name}", image[None])
        writer.flush()


def write_options(run_dir: Path, args, images):
    """Write `args` to `RUN_DIR/options.json`, and warn if the run was begun on other images."""
    path = run_dir / "options.json"
    with contextlib.suppress(OSError, ValueError, AttributeError):  # none yet, or unreadable
        if json.loads(path.read_text()).get("images", images.fingerprint) != images.fingerprint:
            print("Warning: the training images have changed since this run began", file=sys.stderr)
    options = {**vars(args), "images": images.fingerprint}
    for name in ("data_dir", "weights"):  # to find them from any folder
        options[name] = options[name] and os.path.abspath(options[name])
    with data.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(options, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------- the loop


@dataclasses.dataclass
class Phase:
    """One of the two phases of training, as `fit` needs it."""

    name: str  # of its checkpoints and logs
    steps: int
    step: Callable  # compiled: (lr, hr) -> dict of scalars
    state: dict  # networks and optimizers, the contents of a checkpoint; "generator" and its "optimizer" among them
    seed: int  # of the order of the patches
    vgg: keras.Model | None = None  # for the content loss of validation


def pretrain(args, generator) -> Phase:
    """SRResNet: the generator alone, on the MSE."""
    schedule = make_schedule(args.lr_decay, args.lr_pre_gen, args.PREGENSTEPS)
    state = {"generator": generator, "optimizer": make_optimizer(schedule, generator, args.ema)}
    return Phase("pretrain", args.PREGENSTEPS, make_pretrain_step(**state), state, args.seed)


def train_gan(args, generator, vgg) -> Phase:
    """SRGAN: the generator against a new discriminator, on the perceptual loss."""
    keras.utils.set_random_seed(args.seed + 1)  # the same whether or not pre-training ran in this process
    schedule = make_schedule(args.lr_decay, args.lr_gen, args.STEPS, drop=True)
    state = {"generator": generator, "discriminator": model.discriminator(args.precision)}
    state["optimizer"] = make_optimizer(schedule, generator, args.ema)
    state["discriminator_optimizer"] = make_optimizer(schedule, state["discriminator"])
    return Phase("gan", args.STEPS, make_gan_step(vgg=vgg, **state), state, args.seed + 1, vgg)


@contextlib.contextmanager
def catch_signals():
    """Yields a list that gets the first SIGINT or SIGTERM. A second one ends the program at once."""
    caught = []

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fit(phase: Phase, weights: Path, images, pairs, args):
    """Train one phase from its newest checkpoint to its last step, and write the generator's `weights`.

    Raises:
        SystemExit: after a signal, when the state is saved; the code is 128 plus the signal's number.
        FloatingPointError: if a loss or a weight is not finite.
        OSError: if a checkpoint, the logs or the weights can't be written.
    """
    name, steps, run_dir, chief = phase.name, phase.steps, Path(args.run_dir), is_chief()
    checkpoints = Checkpoints(run_dir / "checkpoints", name, **phase.state)
    start = checkpoints.restore()
    check_same_step(start)
    if start >= steps and weights.exists():
        print(f"{name}: finished before, after {start} steps: see {weights}")
        return

    average = make_averaging(phase.state["generator"], phase.state["optimizer"], images, args)
    validate, status = make_validation(average, pairs, phase.vgg), {}

    def evaluate(step):
        scalars, sr = validate()
        log(writer, step, scalars, SR=sr)
        status["PSNR"] = f"{scalars['PSNR']:.2f}"

    writer = open_logs(run_dir / "logs" / name, start and start + 1) if chief else None
    if start:
        print(f"{name}: continuing after step {start}")
    elif chief:
        log(writer, 0, {}, bicubic=data.bicubic(pairs[0][0]), HR=pairs[0][1])
        evaluate(0)

    print(f"{name}: compiling the training step ...", flush=True)
    clock = saved = time.perf_counter()
    won = 0  # points in a row at which the discriminator made no mistake
    bar = tqdm(total=steps, initial=start, desc=name, unit="step", dynamic_ncols=True)
    batches = data.patches(images, args.BATCH_SIZE, start, steps, phase.seed, args.jpeg)
    batches = tf.distribute.get_strategy().experimental_distribute_dataset(batches)  # an equal share for each device
    with bar, catch_signals() as signals:
        for step, (lr, hr) in enumerate(batches, start + 1):
            # Step.
            scalars = phase.step(lr, hr)
            first, last, stopping = step == start + 1, step == steps, bool(signals)
            logging = last or step % LOG_EVERY == 0
            evaluating = last or step % args.eval_every == 0
            saving = last or stopping or step % args.save_every == 0 or time.perf_counter() - saved > SAVE_AFTER

            # Log.
            if first or logging or evaluating or saving:
                scalars = {key: float(value) for key, value in scalars.items()}  # waits for the device
                checkpoints.check_finite(step, scalars, weights=evaluating or saving)
                status.update((key.removesuffix(" Loss"), f"{value:.4g}") for key, value in scalars.items())
            if chief and logging:
                log(writer, step, scalars)
                won = won + 1 if scalars.get("D(HR)", 0) > 0.95 and scalars["D(SR)"] < 0.05 else 0
                if won == WON_AFTER:
                    hint = "try a lower --lr_gen, or more --PREGENSTEPS in a new --run_dir"
                    bar.write(f"Warning: the discriminator tells all images apart: {hint}", file=sys.stderr)
            if first:
                bar.write(f"{name}: compiled, with the first step, in {time.perf_counter() - clock:.1f} s")
                bar.unpause()  # so that the time left doesn't count the compiling
                clock = time.perf_counter()
            else:
                speed = (step - start - 1) * args.BATCH_SIZE / (time.perf_counter() - clock)
                status["patches/s"] = f"{speed:.1f}"

            # Validate.
            if chief and evaluating:
                evaluate(step)
            bar.set_postfix(status, refresh=False)
            bar.update()

            # Save. The weights are written first, so that the last checkpoint vouches for them.
            if chief and last:
                save_weights(average(), weights)
            if saving:
                saved = time.perf_counter()
                if chief:
                    checkpoints.save(step)

            # Stop.
            if signals and saving:
                if chief:
                    bar.write(f"Interrupted and saved: the same command continues from {checkpoints.path(step)}")
                sys.exit(128 + signals[0])
    if chief and start >= steps:  # the run was finished, and its weights are gone
        save_weights(average(), weights)
    check_same_step(steps)  # waits until the weights are there
    print(f"To upscale: python3 main.py --pretrained --weights {weights}")


def train(args):
    """Train SRResNet and then SRGAN on all devices, as `args` (the flags of main.py) say.

    Whatever could fail later is tried before the first step. Raises what `fit` raises, ValueError and MemoryError.
    """
    strategy, run_dir = make_strategy(), Path(args.run_dir)
    devices = strategy.num_replicas_in_sync
    if args.BATCH_SIZE % devices:
        raise ValueError(f"--BATCH_SIZE {args.BATCH_SIZE} must be a multiple of the number of devices, {devices}")
    if devices > 1:
        print(f"Training on {devices} devices")
    try:
        with strategy.scope(), data.lock(run_dir, wait=False) if is_chief() else contextlib.nullcontext():
            train_both(args, run_dir)
    except tf.errors.ResourceExhaustedError as error:
        raise MemoryError(f"out of memory with --BATCH_SIZE {args.BATCH_SIZE}: try a smaller one") from error
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError) as error:
        message = "another worker is gone: start the same command on each again, to continue from the last checkpoint"
        raise ConnectionError(message) from error


def train_both(args, run_dir: Path):
    """Load everything that the two phases share, and run them."""
    vgg = losses.vgg_features(args.vgg_layer, args.vgg_weights, args.precision) if args.STEPS else None
    keras.utils.set_random_seed(args.seed)
    generator = model.generator(args.precision)
    srresnet, srgan = run_dir / "srresnet.weights.h5", run_dir / "srgan.weights.h5"
    if args.weights or not args.PREGENSTEPS:
        model.load_weights(generator, args.weights or srresnet)

    images, valid_images = data.load(args.data_dir)
    pairs = validation_pairs(valid_images)
    if is_chief():
        write_options(run_dir, args, images)
    print(f"{len(images)} images to train on, {len(valid_images)} to validate on")

    if args.PREGENSTEPS:
        fit(pretrain(args, generator), srresnet, images, pairs, args)
        model.load_weights(generator, srresnet)  # averaged, with --ema
    if args.STEPS:
        fit(train_gan(args, generator, vgg), srgan, images, pairs, args)
