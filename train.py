"""Training: SRResNet with the MSE, then SRGAN with the perceptual loss (Ledig et al. 2017, section 3.2).

From the same start, a run on a CPU always ends with the same weights, bit for bit, interrupted or not: on the same
machine, with the same number of cores and the same versions of the packages. On a GPU, results vary slightly.
"""

import contextlib
import hashlib
import json
import math
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

import data
import losses
import model

LOG_EVERY = 10  # steps between points of the curves: reading a loss waits for the device
LOOP_STEPS = 10  # steps of one call on a GPU
LOOP_ON_CPU = False  # it is slower there, but can be tested
KEEP = 2  # newest checkpoints of a phase
SAVE_SECONDS = 300  # between checkpoints at most
VALIDATION_IMAGES = 10
VALIDATION_SIDE = 96  # LR pixels of each image that are upscaled, in both directions
# The phases, and the flags of their steps and learning rates.
PHASES = {"pretrain": ("PREGENSTEPS", "lr_pre_gen"), "gan": ("STEPS", "lr_gen"), "finish": ("finish", "lr_gen")}
# What can't change when a run is resumed: KEPT; KEPT_BY_GAN, once the GAN has begun; STEPS, once its finish has.
KEPT = ("BATCH_SIZE", "images", "weights", "precision", "ema", "jpeg", "seed")
KEPT_BY_GAN = ("PREGENSTEPS", "vgg_layer", "adversarial", "colour", "penalty", "mesh")


# ---- Devices ----


def make_strategy() -> tf.distribute.Strategy:
    """All GPUs of this machine, or of all machines that TF_CONFIG names; else one device. Raises UserError."""
    if os.environ.get("TF_CONFIG"):
        print("Waiting for all workers of TF_CONFIG", flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would not run while TensorFlow waits
        try:
            return tf.distribute.MultiWorkerMirroredStrategy()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise data.UserError(f"TF_CONFIG doesn't name the workers and which of them this is: {error}") from error
    if len(tf.config.list_logical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


def is_chief() -> bool:
    """Whether this is the one of several workers that validates and writes. A worker alone is."""
    return tf.distribute.get_strategy().extended.should_checkpoint


def wait_for_workers(step: int):
    """Wait until all workers are here. Raises UserError if they are not at the same step."""
    strategy = tf.distribute.get_strategy()

    @tf.function(autograph=False)
    def sum_of_steps():
        return strategy.reduce("SUM", strategy.run(tf.constant, (step,)), axis=None)

    if int(sum_of_steps()) != step * strategy.num_replicas_in_sync:
        raise data.UserError("the workers see different checkpoints: the run's folder must be one that they all share")


# ---- Optimizer ----


def learning_rates(phase: str, steps: int, args):
    """The learning rate of each step. The paper's: after the pre-training, a tenth in the second half of a phase."""
    _, flag = PHASES[phase]
    rate = getattr(args, flag)
    if args.lr_decay == "cosine":
        return keras.optimizers.schedules.CosineDecay(rate, max(1, steps))
    second = rate
    if args.lr_decay == "paper" and phase != "pretrain":
        second = rate / 10
    last = max(0, steps // 2 - 1)  # of the first half, counted from 0
    # A constant rate is a schedule, too: Keras saves a plain number in the checkpoint, and would restore an old one.
    return keras.optimizers.schedules.PiecewiseConstantDecay([last], [rate, second])


def adam(network, phase: str, steps: int, args, ema: float = 0.0):
    """The paper's Adam. With `ema`, it also keeps averages of the weights over the steps, with this decay."""
    # An average reaches back over a quarter of the steps at most: earlier weights had a higher learning rate.
    ema_momentum = min(ema, steps / (steps + 4))
    rates = learning_rates(phase, steps, args)
    optimizer = keras.optimizers.Adam(rates, beta_1=0.9, use_ema=ema > 0, ema_momentum=ema_momentum)
    optimizer.build(network.trainable_variables)
    return optimizer


def update(network, optimizer, tape, loss):
    """Take one step of the optimizer."""
    # `apply` sums gradients over the devices, so each contributes its share of the mean.
    share = tf.constant(1 / tf.distribute.get_strategy().num_replicas_in_sync)
    gradients = tape.gradient(loss, network.trainable_variables, share)
    optimizer.apply(gradients, network.trainable_variables)


# ---- The phases ----


class Phase(NamedTuple):
    """What `fit` trains."""

    name: str
    steps: int
    seed: int  # of the order of the patches
    # Takes one step on a batch, LR (n, 24, 24, 3) and HR (n, 96, 96, 3), float32. Returns losses by their names.
    step: Callable
    state: dict  # what a checkpoint holds: networks and optimizers by their names
    vgg: keras.Model | None = None  # for the content loss in validation


def srresnet_phase(generator, args) -> Phase:
    """The generator alone, on the MSE (equation 4)."""
    steps = args.PREGENSTEPS
    optimizer = adam(generator, "pretrain", steps, args, args.ema)

    def step(lr, hr):
        with tf.GradientTape() as tape:
            loss = losses.mse_loss(hr, generator(lr, training=True))
        update(generator, optimizer, tape, loss)
        return {"MSE Loss": loss}

    return Phase("pretrain", steps, args.seed, step, {"generator": generator, "optimizer": optimizer})


def srgan_phase(name: str, steps: int, seed: int, generator, vgg, args) -> Phase:
    """The generator against a new discriminator, on the perceptual loss (equation 3)."""
    keras.utils.set_random_seed(seed)  # the same whether or not earlier phases ran in this process
    discriminator = model.discriminator()
    optimizer = adam(generator, name, steps, args, args.ema)
    discriminator_optimizer = adam(discriminator, name, steps, args)

    def step(lr, hr):
        with tf.GradientTape() as generator_tape, tf.GradientTape() as discriminator_tape:
            sr = generator(lr, training=True)
            with tf.GradientTape() as penalty_tape:
                penalty_tape.watch(hr)
                logits_hr = discriminator(hr, training=True)
            logits_sr = discriminator(sr, training=True)

            # The generator's images should have the features of the originals, and pass for originals.
            content = losses.content_loss(vgg(hr), vgg(sr))
            adversarial = losses.adversarial_loss(logits_sr)
            generator_loss = content + args.adversarial * adversarial  # equation 3
            scalars = {"Content Loss": content, "Adversarial Loss": adversarial}
            if args.colour:
                colour = losses.colour_loss(hr, sr)
                generator_loss += args.colour * colour
                scalars["Colour Loss"] = colour

            # The discriminator should tell the two apart.
            discriminator_loss = losses.discriminator_loss(logits_hr, logits_sr)
            if args.penalty:
                slopes = penalty_tape.gradient(logits_hr, hr)
                discriminator_loss += args.penalty * losses.gradient_penalty(slopes)
        update(generator, optimizer, generator_tape, generator_loss)
        update(discriminator, discriminator_optimizer, discriminator_tape, discriminator_loss)
        return scalars | {
            "Perceptual Loss": generator_loss,
            "Discriminator Loss": discriminator_loss,
            "D(HR)": tf.reduce_mean(tf.sigmoid(logits_hr)),
            "D(SR)": tf.reduce_mean(tf.sigmoid(logits_sr)),
        }

    state = {
        "generator": generator,
        "optimizer": optimizer,
        "discriminator": discriminator,
        "discriminator_optimizer": discriminator_optimizer,
    }
    return Phase(name, steps, seed, step, state, vgg)


def content_phase(name: str, steps: int, seed: int, generator, vgg, args) -> Phase:
    """The generator alone, on the content loss (equation 5): the finish, or SRGAN without an adversarial loss."""
    optimizer = adam(generator, name, steps, args, args.ema)

    def step(lr, hr):
        with tf.GradientTape() as tape:
            sr = generator(lr, training=True)
            loss = losses.content_loss(vgg(hr), vgg(sr))
            scalars = {"Content Loss": loss}
            if args.colour:
                colour = losses.colour_loss(hr, sr)
                loss += args.colour * colour
                scalars["Colour Loss"] = colour
            if args.mesh:
                mesh = losses.mesh_loss(sr)
                loss += args.mesh * mesh
                scalars["Mesh Loss"] = mesh
        update(generator, optimizer, tape, loss)
        return scalars | {"Perceptual Loss": loss}

    return Phase(name, steps, seed, step, {"generator": generator, "optimizer": optimizer}, vgg)


# ---- Averages and validation ----


class Average:
    """`network`: a copy of the generator with averaged weights, or the generator itself if averaging is off."""

    PATCHES = 256  # to measure normalisation statistics on

    def __init__(self, phase: Phase, images, args):
        self.generator = phase.state["generator"]
        self.optimizer = phase.state["optimizer"]
        self.network = self.generator
        if not self.optimizer.use_ema:
            return
        self.network = model.generator()
        features = self.network.get_layer("trunk").output  # no normalisation comes after it
        self.trunk = keras.Model(self.network.input, features)
        for layer in self.network.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.momentum = 0  # the statistics are those of one batch
        (self.batch,) = data.patches(images, self.PATCHES, 0, 1, args.seed, args.jpeg)

    def update(self):
        """Bring the network up to date."""
        if not self.optimizer.use_ema:
            return
        self.network.set_weights(self.generator.get_weights())
        if self.optimizer.iterations == 0:  # there are no averages yet
            return
        self.optimizer.finalize_variable_values(self.network.trainable_variables)
        # Normalisation statistics belong to the weights that they were measured with, so the averages get their own.
        lr, _ = self.batch
        self.trunk(lr, training=True)


def middle(lr: np.ndarray, hr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The middle of LR `(h, w, 3)` and HR `(4h, 4w, 3)`, at most 96x96 and 384x384 pixels, copied into memory."""
    side = VALIDATION_SIDE
    top = max(lr.shape[0] - side, 0) // 2
    left = max(lr.shape[1] - side, 0) // 2
    lr = lr[top : top + side, left : left + side]
    hr = hr[data.SCALE * top : data.SCALE * (top + side), data.SCALE * left : data.SCALE * (left + side)]
    return np.array(lr), np.array(hr)


def validate(upscaler, pairs, vgg):
    """Score on pairs of LR and HR images.

    Returns the means of PSNR in dB and, with `vgg`, of the content loss, by name, and images of the first pair.
    """
    psnrs = []
    content_losses = []
    images = {}
    for lr, hr in pairs:
        sr = upscaler(lr)
        psnrs.append(losses.psnr(sr, hr))
        if vgg:
            features_hr = vgg(np.float32(hr[None]))
            features_sr = vgg(np.float32(sr[None]))
            content_losses.append(losses.content_loss(features_hr, features_sr))
        if not images:
            images = {"bicubic": data.bicubic(lr), "SR": sr, "HR": hr}
    scalars = {"PSNR": np.mean(psnrs)}
    if vgg:
        scalars["Validation Content Loss"] = np.mean(content_losses)
    return scalars, images


# ---- Checkpoints ----


def write(path: Path, function: Callable[[Path], object]):
    """Let the chief write a file, whole or not at all."""
    if is_chief():
        with data.atomic_write(path) as temporary:
            function(temporary)


def checkpoints(folder: Path) -> list[Path]:
    """The index files of a phase's checkpoints, the oldest first. Their names are the steps."""
    return sorted(folder.glob("*.index"))


def save(checkpoint: tf.train.Checkpoint, folder: Path, step: int):
    """Write a checkpoint, its index file last, and keep only the newest `KEEP`."""
    checkpoint.write(str(folder / f"{step:07d}"))
    for old in checkpoints(folder)[:-KEEP]:
        for file in folder.glob(f"{old.stem}.*"):
            file.unlink()


def restore(checkpoint: tf.train.Checkpoint, folder: Path) -> int:
    """Restore the newest intact checkpoint. Returns its step, 0 if there is none. Raises OSError if all are damaged."""
    paths = checkpoints(folder)
    for path in reversed(paths):
        try:
            checkpoint.read(str(path.with_suffix(""))).assert_consumed()
            return int(path.stem)
        except (tf.errors.OpError, AssertionError, OSError, ValueError, IndexError) as error:
            warnings.warn(f"the checkpoint {path} is damaged ({type(error).__name__})")
    if paths:
        raise OSError(f"all checkpoints in {folder} are damaged: remove them to begin this phase anew")
    return 0


def check_finite(phase: str, step: int, values):
    """Raise UserError if one of the numbers or arrays is not finite."""
    for value in values:
        if not np.isfinite(value).all():
            what = f"{phase}: not finite after step {step}, not saved"
            raise data.UserError(f"{what}: try lower learning rates, or float32 instead of bfloat16")


# ---- The loop ----


def compile_step(step: Callable):
    """Compile `step(lr, hr)` into `run(lrs, hrs, begin, end)`, and say how many steps a call takes.

    On one GPU, XLA compiles a loop, since Python takes longer to start a step there than the GPU to compute it: `run`
    takes ten uint8 batches, stacked, does the steps `begin` to `end - 1` of these, and returns the scalars of the last.
    Elsewhere it takes one batch: XLA doesn't work with several devices, and oneDNN's kernels for CPUs are faster.
    """
    strategy = tf.distribute.get_strategy()

    @tf.function(autograph=False)
    def once(lr, hr):
        return step(tf.cast(lr, tf.float32), tf.cast(hr, tf.float32))

    @tf.function(autograph=False, jit_compile=True)
    def loop(lrs, hrs, begin, end):
        def goes_on(i, scalars):
            return i < end

        def body(i, scalars):
            return i + 1, once(lrs[i], hrs[i])

        names = once.get_concrete_function(lrs[0], hrs[0]).structured_outputs
        _, scalars = tf.while_loop(goes_on, body, (begin, dict.fromkeys(names, tf.constant(0.0))))
        return scalars

    @tf.function(autograph=False)
    def on_all_devices(lr, hr, begin, end):
        scalars = strategy.run(once, (lr, hr))
        return {name: strategy.reduce("MEAN", value, axis=None) for name, value in scalars.items()}

    if strategy.num_replicas_in_sync == 1 and (LOOP_ON_CPU or tf.config.list_physical_devices("GPU")):
        return loop, LOOP_STEPS
    return on_all_devices, 1


@contextlib.contextmanager
def catch_signals():
    """Yields a list that gets the first signal that asks to stop. A second one ends the program at once."""
    caught = []

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    with contextlib.ExitStack() as stack:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):  # SIGUSR1: Slurm's, before the time is up
            number = getattr(signal, name, None)  # Windows has the first two
            if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
                before = signal.signal(number, note)
                stack.callback(signal.signal, number, before)
        yield caught


def fit(phase: Phase, images, validation_pairs, args):
    """Train a phase from its newest checkpoint to its last step. The generator ends with averaged weights, if kept.

    Writes checkpoints into `RUN_DIR/checkpoints/NAME` and TensorBoard's curves and images into `RUN_DIR/logs/NAME`.
    Raises UserError if numbers are not finite, and SystemExit after a signal, when all is saved.
    """
    strategy = tf.distribute.get_strategy()
    chief = is_chief()
    checkpoint = tf.train.Checkpoint(**phase.state)
    folder = Path(args.run_dir) / "checkpoints" / phase.name
    start = restore(checkpoint, folder)
    wait_for_workers(start)

    run, count = compile_step(phase.step)
    first = start - start % count  # calls take `count` batches each, also if a run continues or ends within them
    last = math.ceil(phase.steps / count) * count
    batches = data.patches(images, args.BATCH_SIZE, first, last, phase.seed, args.jpeg)
    if count > 1:
        batches = batches.batch(count).prefetch(1)
    batches = iter(strategy.experimental_distribute_dataset(batches))  # an equal share for each device

    # Made by each worker, since they wait for one another where variables are made, though only the chief validates.
    average = Average(phase, images, args)
    upscaler = model.Upscaler(average.network)
    writer = tf.summary.create_noop_writer()
    if chief:
        writer = tf.summary.create_file_writer(f"{args.run_dir}/logs/{phase.name}")
    before = step = start  # where the last call began and ended
    status = {}

    def log(scalars, crops={}):  # to the progress bar and TensorBoard
        for name, value in scalars.items():
            status[name.removesuffix(" Loss")] = f"{value:.4g}"
        with writer.as_default(step):
            for name, value in scalars.items():
                tf.summary.scalar(name, value)
            for name, image in crops.items():
                tf.summary.image(f"crop/{name}", image[None])
            writer.flush()

    def log_validation():
        average.update()
        upscaler.load(average.network)
        log(*validate(upscaler, validation_pairs, phase.vgg))

    def due(every):  # whether this call has reached a multiple of `every` steps, or the end
        return step == phase.steps or step // every > before // every

    if chief and not start:
        log_validation()
    progress = f"{start} of {phase.steps} steps are done" if start else "compiling the step"
    print(f"{phase.name}: {progress}", flush=True)
    bar = tqdm(total=phase.steps, initial=start, desc=phase.name, unit="step", dynamic_ncols=True, disable=None)
    saved = time.monotonic()
    with bar, catch_signals() as signals:
        while step < phase.steps:
            before = step
            begin = before % count
            step = min(before - begin + count, phase.steps)
            lrs, hrs = next(batches)
            scalars = run(lrs, hrs, tf.constant(begin), tf.constant(begin + step - before))
            if due(LOG_EVERY):
                scalars = {name: float(value) for name, value in scalars.items()}  # waits for the device
                check_finite(phase.name, step, scalars.values())
                log(scalars)
            if chief and due(args.eval_every):
                log_validation()
                if bar.disable:
                    values = ", ".join(f"{name} {value}" for name, value in status.items())
                    print(f"{phase.name} {step}/{phase.steps}: {values}", flush=True)
            bar.set_postfix(status, refresh=False)
            bar.update(step - before)
            stopping = bool(signals)
            if due(args.save_every) or stopping or time.monotonic() - saved > SAVE_SECONDS:
                variables = [variable for part in phase.state.values() for variable in part.variables]
                check_finite(phase.name, step, (variable.numpy() for variable in variables))
                if chief:
                    save(checkpoint, folder, step)
                saved = time.monotonic()
            if stopping:
                if chief:
                    bar.write(f"Interrupted and saved at step {step}: the same command continues")
                sys.exit(128 + signals[0])
    average.update()
    average.generator.set_weights(average.network.get_weights())
    wait_for_workers(step)


# ---- A run ----


def count_cores() -> int:
    """The processor cores that this process may use. Sums of numbers are split among them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def check_options(run_dir: Path, options: dict) -> dict:
    """Write the options to `RUN_DIR/options.json`, and return those that the run had before, or these if it is new.

    Raises UserError if the run can't go on with them. Warns of another number of cores.
    """
    if options["weights"]:  # what counts is what is in it, wherever it lies
        content = Path(options["weights"]).read_bytes()
        options["weights"] = f"sha256 {hashlib.sha256(content).hexdigest()[:16]}"
    file = run_dir / "options.json"
    begun = [name for name in PHASES if checkpoints(run_dir / "checkpoints" / name)]
    before = options  # a new run: nothing has changed
    if begun and file.exists():
        before = json.loads(file.read_text())

    kept = KEPT
    if "gan" in begun or "finish" in begun:
        kept += KEPT_BY_GAN
    if "finish" in begun:
        kept += ("STEPS",)
    for name in kept:
        old = before.get(name)
        new = options[name]
        if old == new:
            continue
        what = f"--{name} {old}, not {new}"
        if name in ("images", "weights"):
            what = f"other {name}"
        raise data.UserError(f"{run_dir} was begun with {what}: use the same, or train in another folder")

    old_cores = before.get("cores", options["cores"])
    if old_cores != options["cores"] and not tf.config.list_physical_devices("GPU"):
        what = f"{run_dir} was begun on {old_cores} processor cores and continues on {options['cores']}"
        warnings.warn(f"{what}: it won't end with exactly the same weights")

    def write_options(path):
        path.write_text(json.dumps(options, indent=2) + "\n")

    write(file, write_options)
    return before


def report_new_rates(run_dir: Path, before: dict, args):
    """Say where another number of steps than before changes the learning rate of a phase that has begun."""
    for phase, (flag, _) in PHASES.items():
        paths = checkpoints(run_dir / "checkpoints" / phase)
        if not paths:
            continue
        step = int(paths[-1].stem)
        old_steps = before[flag]
        new_steps = getattr(args, flag)
        old = float(learning_rates(phase, old_steps, SimpleNamespace(**before))(step))
        new = float(learning_rates(phase, new_steps, args)(step))
        if new_steps != old_steps and new_steps > step and old != new:
            change = f"at step {step}, the learning rate changes from {old:.2g} to {new:.2g}"
            print(f"{phase}: {new_steps} steps instead of {old_steps}: {change}")


def run_phases(run_dir: Path, args):
    """Train SRResNet, SRGAN and its finish, each if it has steps, and write their weights."""
    images, validation_images = data.load(args.data_dir, args.cache_dir)
    before = check_options(run_dir, {**vars(args), "images": images.fingerprint, "cores": count_cores()})
    report_new_rates(run_dir, before, args)
    print(f"{len(images)} images to train on, {len(validation_images)} to validate on")
    count = min(len(validation_images), VALIDATION_IMAGES)
    pairs = [middle(*validation_images[i]) for i in range(count)]

    srresnet = run_dir / "srresnet.weights.h5"
    srgan = run_dir / "srgan.weights.h5"
    gan = run_dir / "gan.weights.h5" if args.finish else srgan
    vgg = None
    if args.STEPS or args.finish:
        vgg = losses.vgg_features(args.vgg_layer, args.vgg_weights)
    gan_phase = srgan_phase if args.adversarial else content_phase  # else nobody would listen to a discriminator

    keras.utils.set_random_seed(args.seed)
    generator = model.generator()
    if args.weights:
        model.load_weights(generator, args.weights)
    elif not args.PREGENSTEPS:
        model.load_weights(generator, srresnet)
    if args.PREGENSTEPS:
        fit(srresnet_phase(generator, args), images, pairs, args)
        write(srresnet, generator.save_weights)
    if args.STEPS:
        fit(gan_phase("gan", args.STEPS, args.seed + 1, generator, vgg, args), images, pairs, args)
        write(gan, generator.save_weights)
    if args.finish:
        fit(content_phase("finish", args.finish, args.seed + 2, generator, vgg, args), images, pairs, args)
        write(srgan, generator.save_weights)
    result = srgan if vgg else srresnet
    print(f"To upscale: python3 main.py --pretrained --weights {shlex.quote(str(result))}")


def train(args):
    """Train as main.py's flags say. Raises UserError, OSError, and SystemExit after a signal, when all is saved.

    The results in the run's folder: `srresnet.weights.h5`, `gan.weights.h5`, which is SRGAN before the finish, if there
    is one, and `srgan.weights.h5`.
    """
    strategy = make_strategy()
    devices = strategy.num_replicas_in_sync
    if args.BATCH_SIZE % devices:
        raise data.UserError(f"--BATCH_SIZE must be a multiple of the {devices} devices")
    try:
        with strategy.scope():
            lock = data.lock(args.run_dir, wait=False) if is_chief() else contextlib.nullcontext()
            with lock:
                run_phases(Path(args.run_dir), args)
    except tf.errors.ResourceExhaustedError as error:
        raise data.UserError(f"out of memory (lower --BATCH_SIZE) or disk: {str(error).splitlines()[0]}") from error
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError) as error:
        raise data.UserError("another worker is gone: start the same command on each again, to continue") from error
