"""Training: SRResNet with MSE, then SRGAN with the perceptual loss (Ledig et al. 2017, section 3.2).

Two compiled steps, one loop for both, validation, checkpoints and TensorBoard.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import sys
import threading
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
KEEP = 2  # newest checkpoints of a phase, beside the best
SAVE_AFTER = 300  # seconds between checkpoints at most, where --save_every steps take longer
WON_AFTER = 50  # points of D(HR) near 1 and D(SR) near 0 before the warning
VALID_PICTURES, VALID_SIZE = 10, 384  # validation looks at the middle of the first few pictures: seconds, also on a CPU

# ------------------------------------------------------------------------------------------------------- the devices


def make_strategy():
    """All GPUs of this machine, or of all machines that TF_CONFIG names; else one device. Raises ValueError."""
    if os.environ.get("TF_CONFIG"):
        print("Waiting for the workers that TF_CONFIG names ...", flush=True)
        try:
            return tf.distribute.MultiWorkerMirroredStrategy()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"TF_CONFIG doesn't name the workers and which of them this is: {error}") from error
    if len(tf.config.list_physical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


def is_chief():
    """Whether this process writes and validates: of several workers one does."""
    return tf.distribute.get_strategy().extended.should_checkpoint


def meet(step):
    """Wait for the other workers. Raises ValueError if they don't come with the same `step`."""
    strategy = tf.distribute.get_strategy()

    @tf.function
    def total():
        return strategy.run(lambda: tf.distribute.get_replica_context().all_reduce("SUM", tf.constant(float(step))))

    for part in strategy.experimental_local_results(total()):
        if float(part) != step * strategy.num_replicas_in_sync:
            raise ValueError(
                "the workers see different checkpoints: --run_dir must be one folder that all of them share"
            )


# --------------------------------------------------------------------------------------------------------- the steps


def compiled(step, xla=None):
    """Compile `step(lr, hr) -> dict of scalars` into one function of a uint8 batch, on all devices.

    `xla=None`: on one GPU. XLA doesn't go with tf.distribute, and on a CPU oneDNN's kernels in a plain graph are faster.
    """
    # A gradient is a sum over the uses of a tensor. TensorFlow adds three or more in an order that depends on timing, and
    # its arithmetic optimizer merges nested sums of two into such a sum: without it, equal runs end in equal bits.
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    if xla is None:
        xla = bool(tf.config.list_physical_devices("GPU"))

    def cast(lr, hr):
        return step(tf.cast(lr, tf.float32), tf.cast(hr, tf.float32))

    if not tf.distribute.has_strategy():
        return tf.function(cast, jit_compile=xla)
    strategy = tf.distribute.get_strategy()

    @tf.function
    def everywhere(lr, hr):
        scalars = strategy.run(cast, (lr, hr))
        return {name: strategy.reduce("MEAN", value, axis=None) for name, value in scalars.items()}

    return everywhere


def descend(optimizer, tape, loss, network):
    """Update `network`. Over several devices `apply` adds up the gradients, so each brings its share of the mean."""
    share = tf.constant(1 / tf.distribute.get_strategy().num_replicas_in_sync)
    optimizer.apply(tape.gradient(loss, network.trainable_variables, share), network.trainable_variables)


def make_pretrain_step(generator, optimizer):
    """One step of SRResNet on the MSE (equation 4). Returns the compiled `step(lr, hr) -> {"MSE Loss": scalar}`."""

    def step(lr, hr):  # (batch, 24, 24, 3), (batch, 96, 96, 3)
        with tf.GradientTape() as tape:
            loss = losses.mse_loss(hr, generator(lr, training=True))
        descend(optimizer, tape, loss, generator)
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
            sr_again = tf.identity(sr)  # so that no gradient is a sum over three uses (see `compiled`)
            logits_hr = discriminator(hr, training=True)
            logits_sr = discriminator(sr_again, training=True)
            # The generator: pictures whose VGG features are those of the original, and that pass for real ones.
            content = losses.content_loss(features_hr, vgg(sr, training=False))
            adversarial = losses.adversarial_loss(logits_sr)
            colour = losses.colour_loss(hr, sr_again)
            perceptual = losses.perceptual_loss(content, adversarial, colour)
            # The discriminator: real and generated pictures told apart.
            discrimination = losses.discriminator_loss(logits_hr, logits_sr)
        descend(optimizer, generator_tape, perceptual, generator)
        descend(discriminator_optimizer, discriminator_tape, discrimination, discriminator)
        return {
            "Perceptual Loss": perceptual,
            "Discriminator Loss": discrimination,
            "Content Loss": content,
            "Adversarial Loss": adversarial,
            "Colour Loss": colour,
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
    if not optimizer.use_ema or not optimizer.iterations.numpy():
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


def make_validation(generator, pairs, vgg=None):
    """Returns `validate() -> (scalars, first picture's SR)`: the mean PSNR in dB and, with `vgg`, the mean content loss."""

    @tf.function(input_signature=[tf.TensorSpec((1, None, None, 3), tf.uint8)] * 2)
    def compare(lr, hr):
        sr = tf.round(tf.clip_by_value(generator(tf.cast(lr, tf.float32), training=False), 0, 255))
        content = losses.content_loss(vgg(tf.cast(hr, tf.float32)), vgg(sr)) if vgg else 0.0
        return tf.cast(sr[0], tf.uint8), content

    def validate():
        results = [compare(lr[None], hr[None]) for lr, hr in pairs]
        pictures = [sr.numpy() for sr, _ in results]
        scalars = {"PSNR": np.mean([losses.psnr(sr, hr) for sr, (_, hr) in zip(pictures, pairs)])}
        if vgg:
            scalars["Validation Content Loss"] = np.mean([float(content) for _, content in results])
        return scalars, pictures[0]

    return validate


def save_weights(generator, path):
    """Write the file whole or not at all."""
    with data.atomic_write(path) as temporary:
        generator.save_weights(temporary)


# ------------------------------------------------------------------------------------- checkpoints and TensorBoard's logs


def reason(error):
    """The end of TensorFlow's message, after the names of operations and temporary files."""
    return str(error).splitlines()[0].partition(" [Op:")[0].rpartition("; ")[2]


class Checkpoints:
    """The state of one phase, networks and optimizers, in folders `NAME-STEP` that are whole or not there.

    The order of the data needs no state: a batch follows from its step. `best` is the step whose validation had the
    highest `score` so far.
    """

    def __init__(self, folder, name, **parts):
        self.folder, self.name = folder, name
        self.parts = parts.values()
        self.state = tf.train.Checkpoint(**parts)
        self.best, self.score = 0, -math.inf

    @staticmethod
    def step_of(path):
        return int(path.name.rpartition("-")[2])

    def all(self):
        """The checkpoints' paths, newest first."""
        return sorted(self.folder.glob(f"{self.name}-*[0-9]"), key=self.step_of, reverse=True)

    def save(self, step):
        """Write beside the older ones, rename, then remove all but the last few and the best. Raises OSError."""
        path = self.folder / f"{self.name}-{step:07d}"
        new = self.folder / f"{path.name}.new"
        for left in self.folder.glob(f"{self.name}-*.new"):  # by a run that was killed while it wrote
            shutil.rmtree(left)
        try:
            self.state.write(str(new / "state"))
            (new / "best.json").write_text(json.dumps([self.best, self.score]))
        except (OSError, tf.errors.OpError) as error:
            shutil.rmtree(new, ignore_errors=True)
            raise OSError(
                f"can't write the checkpoint {path}, those before it are still good: {reason(error)}"
            ) from error
        shutil.rmtree(path, ignore_errors=True)
        os.replace(new, path)
        for old in self.all()[KEEP:]:
            if self.step_of(old) != self.best:
                shutil.rmtree(old)

    def record(self, step, score):
        """Remember the step if its score is the highest so far. Returns whether it is."""
        if score <= self.score:
            return False
        self.best, self.score = step, float(score)
        return True

    def finite(self):
        """Whether each number of the state is."""
        return all(np.isfinite(v.numpy()).all() for part in self.parts for v in part.variables)

    def restore(self):
        """Restore the newest intact checkpoint. Returns its step; 0 if there is none. Raises OSError if all are damaged."""
        paths = self.all()
        for path in paths:
            try:
                best, score = json.loads((path / "best.json").read_text())
                self.state.read(str(path / "state")).assert_consumed()
                self.best, self.score = best, score
                return self.step_of(path)
            except (tf.errors.OpError, AssertionError, OSError, ValueError) as error:
                print(f"Warning: the checkpoint {path} is damaged ({type(error).__name__})", file=sys.stderr)
        if paths:
            raise OSError(f"no checkpoint in {self.folder} is intact: remove the folder to start over")
        return 0


class Logs:
    """TensorBoard's file in `folder`, of a run that has done `step` steps. Raises OSError where it can't be written."""

    def __init__(self, folder, step):
        with self.writable():
            rewind_logs(folder, step or -1)
            self.writer = tf.summary.create_file_writer(str(folder))
            self.writer.init()

    @contextlib.contextmanager
    def writable(self):
        try:
            yield
        except tf.errors.OpError as error:
            raise OSError(f"can't write TensorBoard's logs, the checkpoints are good: {reason(error)}") from error

    def log(self, step, scalars, pictures={}):
        with self.writable(), self.writer.as_default(step):
            for key, value in scalars.items():
                tf.summary.scalar(key, value)
            for key, picture in pictures.items():
                tf.summary.image(key, picture[None])

    def flush(self):
        with self.writable():
            self.writer.flush()


def rewind_logs(folder, step):
    """Take TensorBoard's points after `step` out of `folder`: a continued run draws them again."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        new = folder / "rewinding"  # a name that TensorBoard doesn't read
        with tf.io.TFRecordWriter(str(new)) as writer:
            try:
                for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
                    if tf.compat.v1.Event.FromString(record).step <= step:
                        writer.write(record)
            except tf.errors.DataLossError:
                pass  # torn where the run was killed
        os.replace(new, path)


def remember_options(run_dir, args):
    """Write `args` to `RUN_DIR/options.json`."""
    new = run_dir / "options.json.new"
    try:
        new.write_text(json.dumps(vars(args), indent=2, default=str) + "\n")
    except OSError as error:
        raise OSError(f"can't write {new}: {error.strerror}") from error
    os.replace(new, run_dir / "options.json")


class Interruption:
    """`received` holds the number of the first SIGINT or SIGTERM; a second one ends the program at once.

    Python's own handler waits for the step to end. So a thread counts the signals, as they come through a socket.
    """

    def __enter__(self):
        self.received = None
        self.previous = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        self.incoming, self.outgoing = socket.socketpair()
        self.outgoing.setblocking(False)
        signal.set_wakeup_fd(self.outgoing.fileno())
        threading.Thread(target=self.count, daemon=True).start()
        return self

    def receive(self, number, frame):
        self.received = number

    def count(self):
        with self.incoming:
            if self.incoming.recv(1) and (second := self.incoming.recv(1)):
                os._exit(128 + second[0])

    def __exit__(self, *exception):
        signal.set_wakeup_fd(-1)
        self.outgoing.close()  # ends the thread
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------- the loop


def check_finite(name, scalars, first, last, checkpoints, weights):
    """Raise FloatingPointError if a loss of the steps `first` to `last` isn't finite or, with `weights`, a weight."""
    finite = all(map(math.isfinite, scalars.values()))
    if finite and not (weights and not checkpoints.finite()):
        return
    paths = checkpoints.all()
    raise FloatingPointError(
        f"{name}: {'a weight' if finite else 'a loss'} is not finite between steps {first} and {last}; last good checkpoint: "
        f"{paths[0] if paths else 'none'}. Try a lower learning rate, or --precision float32"
    )


class VictoryWatch:
    """Warns once of a discriminator that tells all pictures apart for many points: the generator learns little then."""

    def __init__(self):
        self.points = 0

    def __call__(self, scalars):
        if scalars.get("D(HR)", 0) < 0.95 or scalars["D(SR)"] > 0.05:
            self.points = min(self.points, 0)
            return
        self.points += 1
        if self.points == WON_AFTER:
            self.points = -math.inf
            tqdm.write(
                f"Warning: the discriminator has won, D(HR) is {scalars['D(HR)']:.2f} and D(SR) {scalars['D(SR)']:.2f}: "
                "try a lower --lr_gen, or more --PREGENSTEPS",
                file=sys.stderr,
            )


def run_phase(name, step_function, steps, batches, checkpoints, validate, crop, args):
    """Train one phase from its newest checkpoint to `steps`. Returns the signal that cut it off, or None.

    `batches(first, last)`: the data set of the steps after `first`. `validate()`: scalars and the crop's SR. `crop`: the
    `(bicubic, hr)` beside it in TensorBoard. Raises FloatingPointError on a loss that is not finite, OSError, and what
    TensorFlow raises in a step.
    """
    start = checkpoints.restore()
    meet(start)
    if start >= steps:
        return None
    chief = is_chief()
    logs = Logs(Path(args.run_dir) / "logs" / name, start) if chief else None
    shown, watch = {}, VictoryWatch()

    def evaluate(step):
        """Validate and log. Returns whether the generator was never better."""
        scalars, sr = validate()
        logs.log(step, scalars, {"crop/SR": sr})
        shown["PSNR"] = f"{scalars['PSNR']:.2f}"
        # The GAN gives up PSNR for what the content loss measures.
        return checkpoints.record(step, -scalars.get("Validation Content Loss", -scalars["PSNR"]))

    if start:
        print(f"{name}: going on after step {start}")
    elif chief:
        logs.log(0, {}, {"crop/bicubic": crop[0], "crop/HR": crop[1]})
        evaluate(0)

    first, good = start + 1, start
    clock = saved = time.perf_counter()
    print(f"{name}: compiling the training step ...", flush=True)
    with (
        Interruption() as interruption,
        tqdm(total=steps, initial=start, desc=name, unit="step", dynamic_ncols=True) as bar,
    ):
        for step, (lr, hr) in enumerate(batches(start, steps), first):
            scalars = step_function(lr, hr)
            stopped = interruption.received
            saving = step % args.save_every == 0 or step == steps or stopped or time.perf_counter() - saved > SAVE_AFTER
            evaluating = step % args.eval_every == 0 or step == steps
            logging = step % LOG_EVERY == 0 or step == steps
            if step == first or saving or evaluating or logging:
                scalars = {key: float(value) for key, value in scalars.items()}  # waits for the device
                check_finite(name, scalars, good + 1, step, checkpoints, weights=saving or evaluating)
                good = step
                watch(scalars)
                shown.update((key.removesuffix(" Loss"), f"{value:.4g}") for key, value in scalars.items())
                if chief and logging:
                    logs.log(step, scalars)
            if step == first:
                bar.write(f"{name}: compiled, with the first step, in {time.perf_counter() - clock:.1f} s")
                bar.unpause()  # its time left is to be without the compiling
                clock = time.perf_counter()
            else:
                shown["patches/s"] = f"{(step - first) * args.BATCH_SIZE / (time.perf_counter() - clock):.1f}"
            best = chief and evaluating and evaluate(step)
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if saving or best:
                saved = time.perf_counter()
                if chief:
                    logs.flush()
                    checkpoints.save(step)
            if stopped:
                return stopped
    return None


def train(args):
    """Train SRResNet and then SRGAN as `args`, the flags of main.py, say, on all devices. Returns the exit code.

    Whatever could fail later is tried before the first step. Raises OSError, ValueError, FloatingPointError, MemoryError.
    """
    strategy = make_strategy()
    devices = strategy.num_replicas_in_sync
    if args.BATCH_SIZE % devices:
        raise ValueError(f"--BATCH_SIZE {args.BATCH_SIZE} can't be shared equally by {devices} devices")
    if devices > 1:
        print(f"Training on {devices} devices")
    with strategy.scope():
        return train_both(args)


def train_both(args):
    run_dir = Path(args.run_dir)
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    chief = is_chief()
    if chief:
        remember_options(run_dir, args)
    vgg = losses.vgg_features(args.vgg_layer, args.vgg_weights, args.precision) if args.STEPS else None
    train_pictures, valid_pictures = data.load(args.data_dir)
    pairs = validation_pairs(valid_pictures)
    print(f"{len(train_pictures)} pictures to train on, {len(valid_pictures)} to validate on")

    keras.utils.set_random_seed(args.seed)
    generator = model.generator(args.precision)
    srresnet, srgan = run_dir / "srresnet.weights.h5", run_dir / "srgan.weights.h5"
    if args.weights or not args.PREGENSTEPS:
        model.load_weights(generator, args.weights or srresnet)
    crop = data.bicubic(pairs[0][0]), pairs[0][1]

    def run(name, steps, step_function, optimizer, seed, weights, vgg=None, **networks):
        """One phase and its weights file. Returns the exit code."""
        validate = make_validation(generator, pairs, vgg)

        def validate_averaged():
            with averaged_weights(generator, optimizer):
                return validate()

        def batches(first, last):
            def share(worker):
                part, parts = worker.input_pipeline_id, worker.num_input_pipelines
                patches = data.patches(train_pictures, args.BATCH_SIZE, first, last, seed, args.jpeg, part, parts)
                return patches.rebatch(worker.get_per_replica_batch_size(args.BATCH_SIZE), drop_remainder=True)

            return tf.distribute.get_strategy().distribute_datasets_from_function(share)

        checkpoints = Checkpoints(run_dir / "checkpoints", name, generator=generator, optimizer=optimizer, **networks)
        try:
            stopped = run_phase(name, step_function, steps, batches, checkpoints, validate_averaged, crop, args)
            if stopped:
                if chief:
                    print(f"Interrupted, and saved: the same command goes on from {checkpoints.all()[0]}")
                return 128 + stopped
            if chief:
                with averaged_weights(generator, optimizer):
                    save_weights(generator, weights)
            meet(steps)  # the weights are there
        except tf.errors.ResourceExhaustedError as error:
            raise MemoryError(f"out of memory with --BATCH_SIZE {args.BATCH_SIZE}: try a smaller one") from error
        except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError) as error:
            raise ConnectionError(
                "another worker is gone: start the same command on each again, and the run goes on from its last checkpoint"
            ) from error
        print(f"Upscale with it: python3 main.py --pretrained --weights {weights}")
        return 0

    code = 0
    if args.PREGENSTEPS:
        optimizer = make_optimizer(make_schedule(args.lr_decay, args.lr_pre_gen, args.PREGENSTEPS), generator, args.ema)
        code = run(
            "pretrain", args.PREGENSTEPS, make_pretrain_step(generator, optimizer), optimizer, args.seed, srresnet
        )
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
        code = run("gan", args.STEPS, step_function, optimizer, args.seed + 1, srgan, vgg, **networks)
    return code
