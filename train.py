"""Training: SRResNet with MSE, then SRGAN with the perceptual loss (Ledig et al. 2017, section 3.2).

Two compiled steps, one loop for both, validation, checkpoints and TensorBoard.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

import data
import losses
import model

LOG_EVERY = 10  # steps between TensorBoard's points: reading a loss waits for the device
KEEP = 2  # checkpoints of a phase
VALID_PICTURES, VALID_SIZE = 10, 384  # validation looks at the middle of the first few pictures: seconds, also on a CPU

# --------------------------------------------------------------------------------------------------------- the steps


def compiled(step):
    """Compile `step(lr, hr) -> dict of scalars` into one function of a uint8 batch.

    XLA is for a GPU. On a CPU oneDNN's kernels in a plain graph are faster: 1.5 times, measured at batch 16.
    """

    def cast(lr, hr):
        return step(tf.cast(lr, tf.float32), tf.cast(hr, tf.float32))

    return tf.function(cast, jit_compile=bool(tf.config.list_physical_devices("GPU")))


def make_pretrain_step(generator, optimizer):
    """One step of SRResNet on the MSE (equation 4). Returns the compiled `step(lr, hr) -> {"MSE Loss": scalar}`."""

    def step(lr, hr):  # (batch, 24, 24, 3), (batch, 96, 96, 3)
        with tf.GradientTape() as tape:
            loss = losses.mse_loss(hr, generator(lr, training=True))
        variables = generator.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        return {"MSE Loss": loss}

    return compiled(step)


def make_gan_step(generator, discriminator, vgg, optimizer, discriminator_optimizer):
    """One step of both networks of SRGAN (equations 2 and 3), with one forward pass of each.

    Returns the compiled `step(lr, hr)`, whose scalars are the losses and the mean probabilities D(HR) and D(SR).
    """

    def step(lr, hr):
        features_hr = vgg(hr, training=False)
        with tf.GradientTape() as generator_tape, tf.GradientTape() as discriminator_tape:
            sr = generator(lr, training=True)
            logits_hr = discriminator(hr, training=True)
            logits_sr = discriminator(sr, training=True)
            # The generator: pictures whose VGG features are those of the original, and that pass for real ones.
            content = losses.content_loss(features_hr, vgg(sr, training=False))
            adversarial = losses.adversarial_loss(logits_sr)
            perceptual = losses.perceptual_loss(content, adversarial)
            # The discriminator: real and generated pictures told apart.
            discrimination = losses.discriminator_loss(logits_hr, logits_sr)
        gradients = generator_tape.gradient(perceptual, generator.trainable_variables)
        optimizer.apply(gradients, generator.trainable_variables)
        gradients = discriminator_tape.gradient(discrimination, discriminator.trainable_variables)
        discriminator_optimizer.apply(gradients, discriminator.trainable_variables)
        return {
            "Perceptual Loss": perceptual,
            "Discriminator Loss": discrimination,
            "Content Loss": content,
            "Adversarial Loss": adversarial,
            "D(HR)": tf.reduce_mean(tf.sigmoid(logits_hr)),
            "D(SR)": tf.reduce_mean(tf.sigmoid(logits_sr)),
        }

    return compiled(step)


def make_schedule(name, learning_rate, steps, drop=False):
    """The learning rate over the steps. `drop` marks the GAN, where the paper goes on with a tenth after one half."""
    if name == "cosine":
        return keras.optimizers.schedules.CosineDecay(learning_rate, max(1, steps))
    second = learning_rate / 10 if name == "paper" and drop else learning_rate
    return keras.optimizers.schedules.PiecewiseConstantDecay([max(1, steps // 2)], [learning_rate, second])


def make_optimizer(schedule, network, ema=0.0):
    optimizer = keras.optimizers.Adam(schedule, beta_1=0.9, use_ema=ema > 0, ema_momentum=ema or 0.99)
    optimizer.build(network.trainable_variables)
    return optimizer


# -------------------------------------------------------------------------------------------- validation and weights


@contextlib.contextmanager
def averaged_weights(generator, optimizer):
    """Inside, `generator` has the averages of its weights (--ema), if `optimizer` keeps any."""
    if not optimizer.use_ema or not int(optimizer.iterations):
        yield
        return
    raw = [variable.numpy() for variable in generator.trainable_variables]
    optimizer.finalize_variable_values(generator.trainable_variables)
    try:
        yield
    finally:
        for variable, value in zip(generator.trainable_variables, raw):
            variable.assign(value)


def validation_pairs(pictures):
    """The middle of the first pictures as `(lr, hr)`: whole small ones, at most 384x384 of large ones."""
    pairs = []
    for i in range(min(len(pictures), VALID_PICTURES)):
        lr, hr = pictures[i]
        size = [min(n, VALID_SIZE // 4) for n in lr.shape[:2]]
        top, left = ((n - s) // 2 for n, s in zip(lr.shape, size))
        y, x = np.s_[top : top + size[0]], np.s_[left : left + size[1]]
        pairs.append((np.array(lr[y, x]), np.array(hr[4 * y.start : 4 * y.stop, 4 * x.start : 4 * x.stop])))
    return pairs


def make_validation(generator, pairs):
    """Returns `validate() -> (mean PSNR in dB, first picture's SR)`, on fixed pictures."""

    @tf.function(input_signature=[tf.TensorSpec((1, None, None, 3), tf.uint8)])
    def upscale(lr):
        sr = generator(tf.cast(lr, tf.float32), training=False)
        return tf.cast(tf.round(tf.clip_by_value(sr, 0, 255)), tf.uint8)

    def validate():
        pictures = [upscale(lr[None])[0].numpy() for lr, _ in pairs]
        return float(np.mean([losses.psnr(sr, hr) for sr, (_, hr) in zip(pictures, pairs)])), pictures[0]

    return validate


def save_weights(generator, path):
    """Write the file whole or not at all."""
    temporary = path.with_name(f".new.{path.name}")
    try:
        generator.save_weights(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------- checkpoints and TensorBoard's logs


class Checkpoints:
    """The state of one phase, networks and optimizers, in folders `NAME-STEP` that are whole or not there.

    The order of the data needs no state: a batch follows from its step.
    """

    def __init__(self, folder, name, **parts):
        self.folder, self.name = folder, name
        self.state = tf.train.Checkpoint(**parts)

    @staticmethod
    def step_of(path):
        return int(path.name.rpartition("-")[2])

    def all(self):
        """The checkpoints' paths, newest first."""
        return sorted(self.folder.glob(f"{self.name}-*[0-9]"), key=self.step_of, reverse=True)

    def save(self, step):
        """Write beside the older ones, rename, then remove all but the last few. Raises OSError."""
        path = self.folder / f"{self.name}-{step:07d}"
        new = self.folder / f"{path.name}.new"
        shutil.rmtree(new, ignore_errors=True)
        try:
            self.state.write(str(new / "state"))
        except tf.errors.OpError as error:
            shutil.rmtree(new, ignore_errors=True)
            raise OSError(f"can't write the checkpoint {path}, those before it are still good: {error.message}") from error
        shutil.rmtree(path, ignore_errors=True)
        os.replace(new, path)
        for old in self.all()[KEEP:]:
            shutil.rmtree(old)

    def restore(self):
        """Restore the newest intact checkpoint. Returns its step; 0 if there is none. Raises OSError if all are damaged."""
        paths = self.all()
        for path in paths:
            try:
                self.state.read(str(path / "state")).assert_consumed()
                return self.step_of(path)
            except (tf.errors.OpError, AssertionError, ValueError) as error:
                print(f"Warning: the checkpoint {path} is damaged ({type(error).__name__})", file=sys.stderr)
        if paths:
            raise OSError(f"no checkpoint in {self.folder} is intact: remove the folder to start over")
        return 0


def rewind_logs(folder, step):
    """Take TensorBoard's points after `step` out of `folder`: a continued run draws them again."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        new = path.with_name(f"new.{path.name}")
        with tf.io.TFRecordWriter(str(new)) as writer:
            try:
                for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
                    if tf.compat.v1.Event.FromString(record).step <= step:
                        writer.write(record)
            except tf.errors.DataLossError:
                pass  # torn where the run was killed
        os.replace(new, path)


class Interruption:
    """`received` holds the number of the first SIGINT or SIGTERM; a second one ends the program at once."""

    def __enter__(self):
        self.received = None
        self.previous = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def receive(self, number, frame):
        self.received = number
        for each in self.previous:
            signal.signal(each, signal.SIG_DFL)

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# options that a run keeps from beginning to end; learning rates may change, and numbers of steps grow
KEPT_OPTIONS = ("BATCH_SIZE", "data_dir", "weights", "vgg_layer", "precision", "ema", "jpeg", "seed")


def remember_options(run_dir, args):
    """Write `args` to `RUN_DIR/options.json`. Raises ValueError if the run there was begun with others that matter."""
    path = run_dir / "options.json"
    options = json.loads(json.dumps(vars(args), default=str))
    if any((run_dir / "checkpoints").glob("*-*")) and path.exists():
        before = json.loads(path.read_text())
        kept = KEPT_OPTIONS + ("PREGENSTEPS",) * any((run_dir / "checkpoints").glob("gan-*"))
        for name in kept:
            if before.get(name) != options[name]:
                raise ValueError(
                    f"the run in {run_dir} was begun with --{name} {before.get(name)}, not {options[name]}: "
                    "go on with that, or give another --run_dir"
                )
    new = run_dir / "options.json.new"
    new.write_text(json.dumps(options, indent=2) + "\n")
    os.replace(new, path)


# ---------------------------------------------------------------------------------------------------------- the loop


def run_phase(name, step_function, steps, batches, checkpoints, validate, crop, args):
    """Train one phase from its newest checkpoint to `steps`. Returns the signal that cut it off, or None.

    `batches(first, last)`: the data set of the steps after `first`. `validate()`: PSNR in dB and the crop's SR. `crop`:
    the `(bicubic, hr)` beside it in TensorBoard. Raises FloatingPointError on a loss that is not finite, and OSError.
    """
    start = checkpoints.restore()
    if start >= steps:
        return None
    logs = Path(args.run_dir) / "logs" / name
    rewind_logs(logs, start or -1)
    writer = tf.summary.create_file_writer(str(logs))

    def log(step, scalars, pictures):
        with writer.as_default(step):
            for key, value in scalars.items():
                tf.summary.scalar(key, value)
            for key, picture in pictures.items():
                tf.summary.image(key, picture[None])

    def evaluate(step):
        psnr, sr = validate()
        log(step, {"PSNR": psnr}, {"crop/SR": sr})
        return f"{psnr:.2f}"

    shown = {}
    if start:
        print(f"{name}: going on after step {start}")
    else:
        log(0, {}, {"crop/bicubic": crop[0], "crop/HR": crop[1]})
        shown["PSNR"] = evaluate(0)

    first, clock = start + 1, time.perf_counter()
    print(f"{name}: compiling the training step ...", flush=True)
    with Interruption() as interruption, tqdm(total=steps, initial=start, desc=name, unit="step", dynamic_ncols=True) as bar:
        for step, (lr, hr) in enumerate(batches(start, steps), first):
            scalars = step_function(lr, hr)
            if step % LOG_EVERY == 0 or step in (first, steps):
                scalars = {key: float(value) for key, value in scalars.items()}  # waits for the device
                if not all(map(math.isfinite, scalars.values())):
                    saved = checkpoints.all()
                    raise FloatingPointError(
                        f"{name}: a loss is not finite between steps {max(first, step - LOG_EVERY + 1)} and {step}; last good "
                        f"checkpoint: {saved[0] if saved else 'none'}. Try a lower learning rate, or --precision float32"
                    )
                shown.update((key.removesuffix(" Loss"), f"{value:.4g}") for key, value in scalars.items())
                if step % LOG_EVERY == 0 or step == steps:
                    log(step, scalars, {})
            if step == first:
                bar.write(f"{name}: compiled, with the first step, in {time.perf_counter() - clock:.1f} s")
                bar.unpause()  # its time left is to be without the compiling
                clock = time.perf_counter()
            else:
                shown["patches/s"] = f"{(step - first) * args.BATCH_SIZE / (time.perf_counter() - clock):.1f}"
            if step % args.eval_every == 0 or step == steps:
                shown["PSNR"] = evaluate(step)
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if step % args.save_every == 0 or step == steps or interruption.received:
                writer.flush()
                checkpoints.save(step)
            if interruption.received:
                break
    writer.close()
    return interruption.received


def train(args):
    """Train SRResNet and then SRGAN as `args`, the flags of main.py, say. Returns the exit code.

    Whatever could fail later is tried before the first step. Raises OSError, ValueError, FloatingPointError, MemoryError.
    """
    run_dir = Path(args.run_dir)
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    remember_options(run_dir, args)
    vgg = losses.vgg_features(args.vgg_layer, args.vgg_weights) if args.STEPS else None
    train_pictures, valid_pictures = data.load(args.data_dir)
    pairs = validation_pairs(valid_pictures)
    print(f"{len(train_pictures)} pictures to train on, {len(valid_pictures)} to validate on")

    keras.utils.set_random_seed(args.seed)
    generator = model.generator(args.precision)
    srresnet, srgan = run_dir / "srresnet.weights.h5", run_dir / "srgan.weights.h5"
    if args.weights or not args.PREGENSTEPS:
        model.load_weights(generator, args.weights or srresnet)
    validate = make_validation(generator, pairs)
    crop = data.bicubic(pairs[0][0]), pairs[0][1]

    def run(name, steps, step_function, optimizer, seed, weights, **networks):
        """One phase and its weights file. Returns the exit code."""

        def validate_averaged():
            with averaged_weights(generator, optimizer):
                return validate()

        def batches(first, last):
            return data.patches(train_pictures, args.BATCH_SIZE, first, last, seed, args.jpeg)

        checkpoints = Checkpoints(run_dir / "checkpoints", name, generator=generator, optimizer=optimizer, **networks)
        try:
            interrupted = run_phase(name, step_function, steps, batches, checkpoints, validate_averaged, crop, args)
        except tf.errors.ResourceExhaustedError as error:
            raise MemoryError(f"out of memory with --BATCH_SIZE {args.BATCH_SIZE}: try a smaller one") from error
        if interrupted:
            print(f"Interrupted, and saved: the same command goes on from {checkpoints.all()[0]}")
            return 128 + interrupted
        with averaged_weights(generator, optimizer):
            save_weights(generator, weights)
        print(f"Upscale with it: python3 main.py --pretrained --weights {weights}")
        return 0

    code = 0
    if args.PREGENSTEPS:
        optimizer = make_optimizer(make_schedule(args.lr_decay, args.lr_pre_gen, args.PREGENSTEPS), generator, args.ema)
        code = run("pretrain", args.PREGENSTEPS, make_pretrain_step(generator, optimizer), optimizer, args.seed, srresnet)
        if code == 0:
            model.load_weights(generator, srresnet)  # the averaged ones, with --ema
    if args.STEPS and code == 0:
        discriminator = model.discriminator(args.precision)
        optimizer, discriminator_optimizer = (
            make_optimizer(make_schedule(args.lr_decay, args.lr_gen, args.STEPS, drop=True), network, ema)
            for network, ema in ((generator, args.ema), (discriminator, 0))
        )
        step_function = make_gan_step(generator, discriminator, vgg, optimizer, discriminator_optimizer)
        networks = {"discriminator": discriminator, "discriminator_optimizer": discriminator_optimizer}
        code = run("gan", args.STEPS, step_function, optimizer, args.seed + 1, srgan, **networks)
    return code
