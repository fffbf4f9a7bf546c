"""Training: SRResNet with the MSE, then SRGAN with the perceptual loss (Ledig et al. 2017, section 3.2)."""

import contextlib
import hashlib
import json
import os
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

LOG_EVERY = 10  # steps between TensorBoard's points, and of one call on a GPU: reading a loss waits for the device
LOOP = False  # several steps in one call, on a CPU, too
KEEP, SAVE_AFTER = 2, 300  # newest checkpoints of a phase; seconds between them at most
VALID_IMAGES, VALID_SIZE = 10, 96  # validation: the middle 96x96 LR pixels of the first ten images
# What can't change when a run is resumed: KEPT; KEPT_BY_GAN, once the GAN has begun; STEPS, once its finish has.
KEPT = ("BATCH_SIZE", "images", "weights", "precision", "ema", "jpeg", "seed")
KEPT_BY_GAN = ("PREGENSTEPS", "vgg_layer", "adversarial", "colour", "artifact", "mesh", "penalty")


def train(args):
    """Train as main.py's flags say. Raises UserError, OSError, and SystemExit after a signal, when all is saved."""
    strategy, run_dir = make_strategy(), Path(args.run_dir)
    srresnet, srgan = run_dir / "srresnet.weights.h5", run_dir / "srgan.weights.h5"
    if args.BATCH_SIZE % strategy.num_replicas_in_sync:
        raise data.UserError(f"--BATCH_SIZE must be a multiple of the {strategy.num_replicas_in_sync} devices")
    chief = strategy.extended.should_checkpoint  # of several workers, the one that writes
    try:
        with strategy.scope(), data.lock(run_dir, wait=False) if chief else contextlib.nullcontext():
            images, valid_images = data.load(args.data_dir, args.cache_dir)
            check_options(run_dir, {**vars(args), "images": images.fingerprint})
            print(f"{len(images)} images to train on, {len(valid_images)} to validate on")
            vgg = losses.vgg_features(args.vgg_layer, args.vgg_weights) if args.STEPS or args.finish else None
            keras.utils.set_random_seed(args.seed)
            generator = model.generator()
            if args.weights or not args.PREGENSTEPS:
                model.load_weights(generator, args.weights or srresnet)
            if args.PREGENSTEPS:
                train_srresnet(generator, images, valid_images, args)
                write(srresnet, generator.save_weights)
            if args.STEPS:
                train_srgan("gan", args.STEPS, args.seed + 1, generator, vgg, images, valid_images, args)
                write(run_dir / "gan.weights.h5" if args.finish else srgan, generator.save_weights)
            if args.finish:
                train_srgan("finish", args.finish, args.seed + 2, generator, vgg, images, valid_images, args)
                write(srgan, generator.save_weights)
            print(f"To upscale: python3 main.py --pretrained --weights {srgan if vgg else srresnet}")
    except tf.errors.ResourceExhaustedError as error:
        raise data.UserError(f"out of memory (lower --BATCH_SIZE) or disk: {str(error).splitlines()[0]}") from error
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError) as error:
        raise data.UserError("another worker is gone: start the same command on each again, to continue") from error


def check_options(run_dir: Path, options: dict):
    """Write the options to `RUN_DIR/options.json`. Raises UserError if the run was begun with others."""
    if options["weights"]:  # what counts is what is in it, wherever it lies
        options["weights"] = f"sha256 {hashlib.sha256(Path(options['weights']).read_bytes()).hexdigest()[:16]}"
    file, begun = run_dir / "options.json", {path.parent.name for path in run_dir.glob("checkpoints/*/*.index")}
    before, finish = json.loads(file.read_text()) if begun and file.exists() else options, "finish" in begun
    for name in KEPT + KEPT_BY_GAN * (finish or "gan" in begun) + ("STEPS",) * finish:
        if (old := before.get(name)) != (new := options[name]):
            what = f"other {name}" if name in ("images", "weights") else f"--{name} {old}, not {new}"
            raise data.UserError(f"{run_dir} was begun with {what}: use the same, or another --run_dir")
    write(file, lambda path: path.write_text(json.dumps(options, indent=2) + "\n"))


def make_strategy() -> tf.distribute.Strategy:
    """All GPUs of this machine, or of all machines that TF_CONFIG names; else one device. Raises UserError."""
    if os.environ.get("TF_CONFIG"):
        print("Waiting for all workers of TF_CONFIG", flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would not run while TensorFlow waits
        try:
            return tf.distribute.MultiWorkerMirroredStrategy()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise data.UserError(f"TF_CONFIG doesn't name the workers and which of them this is: {error}") from error
    several = len(tf.config.list_logical_devices("GPU")) > 1
    return tf.distribute.MirroredStrategy() if several else tf.distribute.get_strategy()


def wait_for_workers(strategy, step: int):
    """Wait until all workers are here. Raises UserError if they are not at the same step."""
    total = tf.function(lambda: strategy.reduce("SUM", strategy.run(tf.constant, (step,)), axis=None), autograph=False)
    if int(total()) != step * strategy.num_replicas_in_sync:
        raise data.UserError("the workers see different checkpoints: --run_dir must be a folder that all of them share")


def write(path, function):
    if tf.distribute.get_strategy().extended.should_checkpoint:  # of several workers, the chief
        with data.atomic_write(path) as temporary:
            function(temporary)


def train_srresnet(generator, images, valid_images, args):
    """The generator alone, on the MSE (equation 4)."""
    optimizer = adam(generator, args.lr_pre_gen, args.PREGENSTEPS, args.lr_decay, args.ema, drop=False)

    def step(lr, hr):  # (batch, 24, 24, 3), (batch, 96, 96, 3)
        with tf.GradientTape() as tape:
            loss = losses.mse_loss(hr, generator(lr, training=True))
        update(generator, optimizer, tape, loss)
        return {"MSE Loss": loss}

    state = {"generator": generator, "optimizer": optimizer}
    fit("pretrain", step, state, args.PREGENSTEPS, args.seed, images, valid_images, args)


def train_srgan(name, steps, seed, generator, vgg, images, valid_images, args):
    """The generator against a new discriminator, on the perceptual loss (equation 3)."""
    keras.utils.set_random_seed(seed)  # the same whether or not earlier phases ran in this process
    discriminator = model.discriminator()
    optimizer = adam(generator, args.lr_gen, steps, args.lr_decay, args.ema)
    discriminator_optimizer = adam(discriminator, args.lr_gen, steps, args.lr_decay)

    def step(lr, hr):
        with tf.GradientTape() as generator_tape, tf.GradientTape() as discriminator_tape:
            sr = generator(lr, training=True)
            with tf.GradientTape() as slope_tape:
                slope_tape.watch(hr)
                logits_hr = discriminator(hr, training=True)
            logits_sr = discriminator(sr, training=True)
            # The generator's images should have the original's features, and pass for real; the rest isn't the paper's.
            terms = {
                "Content Loss": (1, lambda: losses.content_loss(vgg(hr), vgg(sr))),
                "Adversarial Loss": (args.adversarial, lambda: losses.adversarial_loss(logits_sr)),
                "Colour Loss": (args.colour, lambda: losses.colour_loss(hr, sr)),
                "Artifact Loss": (args.artifact, lambda: losses.artifact_loss(hr, sr)),
                "Mesh Loss": (args.mesh, lambda: losses.mesh_loss(sr)),
            }
            terms = {name: (weight, loss()) for name, (weight, loss) in terms.items() if weight}
            perceptual = sum(weight * loss for weight, loss in terms.values())
            # The discriminator should tell real images from generated ones.
            discrimination = losses.discriminator_loss(logits_hr, logits_sr)
            if args.penalty:
                discrimination += args.penalty * losses.gradient_penalty(slope_tape.gradient(logits_hr, hr))
        update(generator, optimizer, generator_tape, perceptual)
        update(discriminator, discriminator_optimizer, discriminator_tape, discrimination)
        scalars = {"Perceptual Loss": perceptual, "Discriminator Loss": discrimination}
        scalars |= {name: loss for name, (_, loss) in terms.items()}
        return scalars | {f"D({x})": tf.reduce_mean(tf.sigmoid(d)) for x, d in (("HR", logits_hr), ("SR", logits_sr))}

    networks = {"generator": generator, "discriminator": discriminator}
    state = networks | {"optimizer": optimizer, "discriminator_optimizer": discriminator_optimizer}
    fit(name, step, state, steps, seed, images, valid_images, args, vgg)


class Adam(keras.optimizers.Adam):
    """Keras's, with TensorFlow's fused kernel: one pass over the weights instead of a dozen."""

    def update_step(self, gradient, variable, learning_rate):
        i, step = self._get_variable_index(variable), tf.cast(self.iterations + 1, tf.float32)
        m, v = self._momentums[i].value.handle, self._velocities[i].value.handle
        rates = {"beta1": self.beta_1, "beta2": self.beta_2, "epsilon": self.epsilon, "lr": learning_rate}
        rates |= {"beta1_power": self.beta_1**step, "beta2_power": self.beta_2**step}
        tf.raw_ops.ResourceApplyAdam(var=variable.handle, m=m, v=v, grad=gradient, **rates)


def adam(network, learning_rate, steps, decay, ema=0.0, drop=True):
    """The paper's Adam: the second half of the GAN has a tenth of the rate (`drop`). `ema` averages the weights."""
    if decay == "cosine":
        schedule = keras.optimizers.schedules.CosineDecay(learning_rate, max(1, steps))
    else:  # constant rates are schedules, too: as a plain number, a checkpoint's rate would replace a new one
        second = learning_rate / 10 if decay == "paper" and drop else learning_rate
        last = max(0, steps // 2 - 1)  # of the first half, counted from 0
        schedule = keras.optimizers.schedules.PiecewiseConstantDecay([last], [learning_rate, second])
    # Averages over a quarter of the steps at most: before, the rate was higher.
    optimizer = Adam(schedule, beta_1=0.9, use_ema=ema > 0, ema_momentum=min(ema, steps / (steps + 4)))
    optimizer.build(network.trainable_variables)
    return optimizer


def update(network, optimizer, tape, loss):
    """Take one optimizer step. `apply` sums gradients over devices, so each contributes its share of the mean."""
    share = tf.constant(1 / tf.distribute.get_strategy().num_replicas_in_sync)
    optimizer.apply(tape.gradient(loss, network.trainable_variables, share), network.trainable_variables)


def fit(name, step_function, state, steps, seed, images, valid_images, args, vgg=None):
    """Train one phase from its newest checkpoint to the step `steps`; with --ema, the generator ends with the averages.

    `step_function(lr, hr)` takes float32 batches and returns a dict of scalars; `state` is what a checkpoint holds.
    """
    strategy, checkpoint = tf.distribute.get_strategy(), tf.train.Checkpoint(**state)
    folder = Path(args.run_dir) / "checkpoints" / name
    step = start = restore(checkpoint, folder)
    wait_for_workers(strategy, start)
    run, count = compiled(step_function)
    first, last = start // count * count, -(-steps // count) * count  # calls begin at multiples of `count`
    batches = data.patches(images, args.BATCH_SIZE, first, last, seed, args.jpeg)
    batches = batches.batch(count).prefetch(1) if count > 1 else batches
    batches = strategy.experimental_distribute_dataset(batches)  # an equal share for each device
    average, validate = make_validation(state["generator"], state["optimizer"], images, valid_images, args, vgg)
    chief, logs = strategy.extended.should_checkpoint, f"{args.run_dir}/logs/{name}"
    writer = tf.summary.create_file_writer(logs) if chief else tf.summary.create_noop_writer()
    intervals, status, saved = (LOG_EVERY, args.eval_every, args.save_every), {}, time.monotonic()

    def log(scalars, crops={}):  # to the progress bar and TensorBoard
        status.update({key.removesuffix(" Loss"): f"{value:.4g}" for key, value in scalars.items()})
        with writer.as_default(step):
            for key, value in scalars.items():
                tf.summary.scalar(key, value)
            for key, image in crops.items():
                tf.summary.image(f"crop/{key}", image[None])
            writer.flush()

    if not start:
        log(*validate())
    print(f"{name}:", f"{start} of {steps} steps are done" if start else "compiling the step", flush=True)
    bar = tqdm(total=steps, initial=start, desc=name, unit="step", dynamic_ncols=True, disable=None)
    with bar, catch_signals() as signals:
        for lrs, hrs in batches if start < steps else ():
            before, step = step, min(step // count * count + count, steps)
            scalars = run(lrs, hrs, tf.constant(before % count), tf.constant((step - 1) % count + 1))
            logging, validating, saving = (step == steps or step // n > before // n for n in intervals)
            if logging:
                scalars = {key: float(value) for key, value in scalars.items()}  # waits for the device
                check_finite(name, step, scalars.values())
                log(scalars)
            if validating:
                log(*validate())
                if bar.disable:
                    print(f"{name} {step}/{steps}: {', '.join(f'{k} {v}' for k, v in status.items())}", flush=True)
            bar.set_postfix(status, refresh=False)
            bar.update(step - before)
            stopping = bool(signals)
            if saving or stopping or time.monotonic() - saved > SAVE_AFTER:
                check_finite(name, step, [value.numpy() for part in state.values() for value in part.variables])
                if chief:
                    checkpoint.write(str(folder / f"{step:07d}"))  # its .index file last
                    for old in sorted(folder.glob("*.index"))[:-KEEP]:
                        for file in folder.glob(f"{old.stem}.*"):
                            file.unlink()
                saved = time.monotonic()
            if stopping:
                bar.write(f"Interrupted{' and saved' * chief} at step {step}: the same command continues")
                sys.exit(128 + signals[0])
    state["generator"].set_weights(average())
    wait_for_workers(strategy, step)


def compiled(step):
    """Compile `step(lr, hr) -> dict of scalars` into `run(lrs, hrs, first, last)`, and say how many steps a call takes.

    On one GPU, XLA compiles a loop, since Python takes longer to start a step there than the GPU to compute it: `run`
    takes ten uint8 batches, stacked, does the steps `first` to `last - 1`, and returns the scalars of the last.
    Elsewhere it takes one batch: XLA doesn't work with several devices, and oneDNN's kernels for CPUs are faster.
    """
    strategy = tf.distribute.get_strategy()

    @tf.function(autograph=False)
    def once(lr, hr):
        return step(tf.cast(lr, tf.float32), tf.cast(hr, tf.float32))

    @tf.function(autograph=False, jit_compile=True)
    def loop(lrs, hrs, first, last):
        scalars = dict.fromkeys(once.get_concrete_function(lrs[0], hrs[0]).structured_outputs, tf.constant(0.0))
        return tf.while_loop(lambda i, _: i < last, lambda i, _: (i + 1, once(lrs[i], hrs[i])), (first, scalars))[1]

    @tf.function(autograph=False)
    def everywhere(lr, hr, first, last):
        scalars = strategy.run(once, (lr, hr))
        return {name: strategy.reduce("MEAN", value, axis=None) for name, value in scalars.items()}

    looping = strategy.num_replicas_in_sync == 1 and (LOOP or tf.config.list_physical_devices("GPU"))
    return (loop, LOG_EVERY) if looping else (everywhere, 1)


def check_finite(name, step, values):
    if not all(np.isfinite(value).all() for value in values):
        raise data.UserError(f"{name}: not finite after step {step}, not saved: try lower rates or --precision float32")


@contextlib.contextmanager
def catch_signals():
    """Yields a list that gets the first signal that asks to stop. A second one ends the program at once."""
    caught = []

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    with contextlib.ExitStack() as stack:
        for number in (getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
                stack.callback(signal.signal, number, signal.signal(number, note))
        yield caught


def restore(checkpoint, folder: Path) -> int:
    """Restore the newest intact checkpoint. Returns its step, 0 if there is none. Raises OSError if all are damaged."""
    for path in sorted(folder.glob("*.index"), reverse=True):
        try:
            checkpoint.read(str(path.with_suffix(""))).assert_consumed()
            return int(path.stem)
        except (tf.errors.OpError, AssertionError, OSError, ValueError, IndexError) as error:
            print(f"Warning: the checkpoint {path} is damaged ({type(error).__name__})", file=sys.stderr)
    if any(folder.glob("*.index")):
        raise OSError(f"all checkpoints in {folder} are damaged: remove them to begin this phase anew")
    return 0


def make_validation(generator, optimizer, images, valid_images, args, vgg=None):
    """Returns functions that average the generator's weights (--ema), and validate these on the middle of images."""
    averaged, pairs = model.generator() if args.ema else generator, []
    averaged.set_weights(generator.get_weights())
    # Normalisation statistics belong to the weights that they were measured with, so the averages get their own.
    normalizations = [layer for layer in averaged.layers if isinstance(layer, keras.layers.BatchNormalization)]
    lrs = [lr for lr, _ in data.patches(images, 16, 0, 16, args.seed, args.jpeg)] if args.ema else ()
    upscale = model.Upscaler(averaged)
    for _, (lr, hr) in zip(range(VALID_IMAGES), valid_images):
        y, x = (max(side - VALID_SIZE, 0) // 2 for side in lr.shape[:2])
        hr = hr[data.SCALE * y :, data.SCALE * x :][: data.SCALE * VALID_SIZE, : data.SCALE * VALID_SIZE]
        pairs.append((np.array(lr[y:, x:][:VALID_SIZE, :VALID_SIZE]), np.array(hr)))

    def average():
        if args.ema and optimizer.iterations > 0:
            averaged.set_weights(generator.get_weights())
            optimizer.finalize_variable_values(averaged.trainable_variables)
            for i, lr in enumerate(lrs):
                for layer in normalizations:
                    layer.momentum = i / (i + 1)  # the mean of all batches so far
                averaged(lr, training=True)
        return averaged.get_weights()

    def validate():  # mean PSNR in dB, content loss if the phase has one, and crops to look at
        average()
        upscale.load(averaged)
        srs = [upscale(lr) for lr, _ in pairs]
        scalars = {"PSNR": np.mean([losses.psnr(sr, hr) for sr, (_, hr) in zip(srs, pairs)])}
        if vgg:
            features = ([vgg(np.float32(image[None])) for image in (hr, sr)] for sr, (_, hr) in zip(srs, pairs))
            scalars["Validation Content Loss"] = np.mean([losses.content_loss(*pair) for pair in features])
        return scalars, {"bicubic": data.bicubic(pairs[0][0]), "SR": srs[0], "HR": pairs[0][1]}

    return average, validate
