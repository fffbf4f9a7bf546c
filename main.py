"""The command line of SRGAN (Ledig et al. 2017, arXiv:1609.04802): train, upscale, evaluate, export.

Flags and paths are checked before TensorFlow is imported, and `-h` needs no package: all are imported where they are
used. Exit codes: 0 done, 1 failed, 2 refused before any work, 128 plus the signal's number if interrupted.
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights" / "srgan.weights.h5"
# The flags of `--recipe release`. The weights in weights/ were trained with nearly these: see weights/README.md.
RELEASE = (
    "--PREGENSTEPS 34000 --STEPS 7000 --finish 300 --BATCH_SIZE 64 --lr_pre_gen 6e-4 --lr_gen 2e-4 --lr_decay cosine "
    "--vgg_layer block3_conv4 --adversarial 1e-2 --colour 10 --artifact 32 --mesh 0.3 --penalty 0.1 --jpeg 60-95 "
    "--ema 0.999"
)


def number(kind, low, high, text):
    """With `functools.partial`, an argparse type: a `kind` from `low` to `high`."""
    with contextlib.suppress(ValueError):
        if low <= (value := kind(text)) <= high:
            return value
    raise argparse.ArgumentTypeError(f"must be a{' whole' * (kind is int)} number from {low} to {high}, not {text}")


def jpeg_qualities(text):
    """An argparse type: a range of JPEG qualities, as `LOW-HIGH`, or one quality."""
    qualities = [int(part) if part.isdecimal() else 0 for part in text.split("-")]
    if len(qualities) > 2 or not 1 <= qualities[0] <= qualities[-1] <= 100:
        raise argparse.ArgumentTypeError(f"must be one or two qualities from 1 to 100, as in 70-95, not {text}")
    return f"{qualities[0]}-{qualities[-1]}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Exits with code 2 if a flag is wrong, or doesn't go with the mode."""
    parser = argparse.ArgumentParser(description="Train SRGAN, or upscale images 4x with it.", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"main.py: {message}\n")  # one line, without the usage
    steps, interval = partial(number, int, 0, 9_999_999), partial(number, int, 1, 9_999_999)
    rate, share, weight = (partial(number, float, *limits) for limits in ((1e-12, 1), (0, 1), (0, 1e6)))

    def add(flag, kind, metavar, default, help, to=None):
        kind = {"type": kind} if callable(kind) else {"choices": kind}
        help += "" if default is None else f" (default: {default})"
        (to or group).add_argument(flag, **kind, metavar=metavar, default=default, help=help)

    group = parser.add_argument_group("main flags")
    add("--STEPS", steps, "N", 2000, "GAN training steps; 0: none")
    add("--PREGENSTEPS", steps, "N", 2000, "generator pre-training steps; 0: none")
    add("--BATCH_SIZE", partial(number, int, 1, 10**6), "N", 128, "patches per step, over all devices")
    add("--lr_pre_gen", rate, "RATE", 1e-4, "learning rate of the pre-training")
    add("--lr_gen", rate, "RATE", 1e-4, "learning rate of the GAN, of both networks")
    modes = group.add_mutually_exclusive_group()
    modes.add_argument("--pretrained", action="store_true", help="upscale --input to --output instead of training")
    add("--evaluate", str, "DIR", None, "print PSNR and SSIM on the images in DIR, or in its HR/ and LR_x4/", modes)
    add("--export", str, "PATH", None, "write the generator as .tflite, .onnx, or else a SavedModel folder", modes)
    group = parser.add_argument_group("upscaling, evaluation and export")
    add("--input", str, "PATH", None, "an image, or a folder of images (default: input.jpg)")
    add("--output", str, "PATH", None, "the image to write, or a folder for the results (default: output.jpg)")
    group.add_argument("--skip_existing", action="store_true", help="skip images whose results are newer")
    add("--weights", str, "FILE", None, f"weights to use (default: weights/{WEIGHTS.name}), or to start training with")
    add("--blend", share, "A", None, "mix the weights of SRResNet (0) and SRGAN (1): low values invent less detail")
    group.add_argument("--ensemble", action="store_true", help="average eight flips and rotations: better, slower")
    group = parser.add_argument_group("training")
    add("--recipe", ("paper", "release"), None, "paper", "release: losses, steps and rates near those of weights/")
    add("--data_dir", str, "DIR", None, "photos, in train/ and valid/ or all in DIR (default: DIV2K, downloaded once)")
    add("--run_dir", str, "DIR", "runs/srgan", "checkpoints, logs and results; the same command resumes a run")
    add("--cache_dir", str, "DIR", None, "for DIV2K and decoded photos (default: data/, or else ~/.cache/srgan)")
    add("--vgg_layer", ("block2_conv2", "block3_conv4", "block5_conv4"), None, "block5_conv4", "for the content loss")
    add("--vgg_weights", str, "FILE", None, "VGG19 weights (default: downloaded once by Keras)")
    add("--adversarial", weight, "W", 1e-3, "weight of the adversarial loss, beside the content loss")
    add("--colour", weight, "W", 0.0, "weight of the colour loss")
    add("--artifact", weight, "W", 0.0, "weight of the artifact loss")
    add("--mesh", weight, "W", 0.0, "weight of the mesh loss")
    add("--penalty", weight, "W", 0.0, "weight of the gradient penalty in the discriminator's loss")
    add("--finish", steps, "N", 0, "GAN training steps after those, with a new discriminator; 0: none")
    add("--lr_decay", ("paper", "cosine", "none"), None, "paper", "paper: a tenth in the GAN's 2nd half; cosine: to 0")
    add("--precision", ("float32", "bfloat16"), None, "float32", "number format to train or upscale in")
    add("--ema", partial(number, float, 0, 0.99999), "DECAY", 0.0, "average the generator's weights over steps; 0: off")
    add("--jpeg", jpeg_qualities, "LOW-HIGH", None, "compress half of the LR patches as JPEG, with these qualities")
    add("--save_every", interval, "N", 100, "steps between checkpoints, which are at most five minutes apart")
    add("--eval_every", interval, "N", 100, "steps between validations")
    add("--seed", partial(number, int, 0, 2**31 - 1), "N", 0, "seed of the initial weights and the order of the data")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args = parser.parse_args(RELEASE.split() + argv) if args.recipe == "release" else args
    training = not (args.pretrained or args.evaluate or args.export)
    upscaling = args.input or args.output or args.skip_existing
    paths = args.input, args.evaluate, args.weights, args.data_dir, args.vgg_weights
    srresnet = f"{args.run_dir}/srresnet.weights.h5"
    start = args.PREGENSTEPS or args.weights or os.path.exists(srresnet)
    pattern = {*args.run_dir} & ({"[", "\\"} - {os.sep})
    lacking = (args.export or "").endswith(".onnx") and not importlib.util.find_spec("tf2onnx")
    mistakes = {
        **{f"--{name} is empty": value == "" for name, value in vars(args).items()},
        **{f"no such file or folder: {path}": not os.path.exists(path) for path in filter(None, paths)},
        "--ensemble can't be exported": args.export and args.ensemble,
        f"--export {args.export} is a folder that exists: give another name": os.path.isdir(args.export or ""),
        "exporting to ONNX needs a package that is not installed: pip install tf2onnx": lacking,
        "--input, --output and --skip_existing need --pretrained": upscaling and not args.pretrained,
        "--blend and --ensemble can't be used in training": training and (args.blend is not None or args.ensemble),
        "--STEPS 0 --PREGENSTEPS 0: nothing to train": training and not (args.STEPS or args.PREGENSTEPS or args.finish),
        f"--PREGENSTEPS 0 needs --weights, or {srresnet}": training and not start,
        f"--run_dir {args.run_dir}: TensorFlow reads [ and \\ as a pattern, choose another name": training and pattern,
    }
    if mistake := next(filter(mistakes.get, mistakes), None):
        parser.error(mistake)
    args.weights = args.weights if training else Path(args.weights or WEIGHTS)
    return args


def upscale(args):
    """`--pretrained`: write each image four times larger. Raises OSError if some failed, after the others."""
    from tqdm import tqdm

    import data

    jobs = todo = data.find_jobs(args.input or "input.jpg", args.output or "output.jpg")
    if args.skip_existing:
        todo = [(a, b) for a, b in jobs if not (b.exists() and b.stat().st_mtime > a.stat().st_mtime)]
        print(f"{len(jobs) - len(todo)} of {len(jobs)} images skipped: their results are newer")
    print(f"Running on {start_tensorflow(args.precision)}", flush=True)
    import model

    upscaler, failed = model.make_upscaler(model.load_generator(args.weights, args.blend), args.ensemble), 0
    for source, target in tqdm(todo, unit="image", disable=len(jobs) == 1 or None):
        try:
            pixels, alpha, metadata = data.read_image(source)
            height, width, _ = pixels.shape
            data.check_output(target, width, height)
            if alpha is not None:
                pixels, alpha = data.spread_colours(pixels, alpha), data.bicubic(alpha)
            data.write_image(target, upscaler(pixels), alpha, metadata)
            tqdm.write(f"{target}: {data.SCALE * width}x{data.SCALE * height}")
        except (OSError, MemoryError) as error:
            if len(todo) == 1:
                raise
            report(error)
            failed += 1
    if failed:
        raise data.UserError(f"{failed} of {len(todo)} images failed")


def evaluate(args):
    """`--evaluate`: print PSNR and SSIM of bicubic and of the model."""
    import data

    pairs = data.scoring_pairs(args.evaluate)
    print(f"Running on {start_tensorflow(args.precision)}", flush=True)
    import losses
    import model

    upscaler = model.make_upscaler(model.load_generator(args.weights, args.blend), args.ensemble)
    row, table = "{:24.24}{:7.2f}  {:.4f}  {:7.2f}  {:.4f}".format, []
    print(f"{'':24}      bicubic          model\n{'':24}   PSNR    SSIM     PSNR    SSIM")
    for name, hr_path, lr_path in pairs:
        lr, hr = data.read_pair(hr_path, lr_path)
        srs = (sr[..., : hr.shape[2]] for sr in (data.bicubic(lr), upscaler(lr)))  # a grey original has one channel
        table.append([score(sr, hr) for sr in srs for score in (losses.psnr, losses.ssim)])
        print(row(name, *table[-1]))
    print(row(f"mean of {len(table)}", *(sum(column) / len(table) for column in zip(*table))))


def export(args):
    """`--export`: write the generator for other programs."""
    target = Path(os.path.realpath(args.export))
    print(f"Running on {start_tensorflow()}", flush=True)
    import data
    import model

    network = model.load_generator(args.weights, args.blend)
    with data.atomic_write(target) as temporary:
        model.export(network, temporary)
    print(f"exported to {target}")


def train(args):
    """Train SRResNet, then SRGAN."""
    # oneDNN: off by default without AVX-512. There it speeds up training 1.8 times, but slows upscaling a lot.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    print(f"Running on {start_tensorflow(args.precision)}", flush=True)
    import train

    train.train(args)


def report(message, label="main.py"):
    """Print one line on stderr, after a label."""
    if isinstance(message, OSError) and message.filename:
        message = f"{message.filename}: {message.strerror}"
    write = sys.modules["tqdm"].tqdm.write if "tqdm" in sys.modules else print  # above the progress bar
    write(f"{label}: {' '.join(str(message).split()) or 'out of memory'}", file=sys.stderr)


def start_tensorflow(precision="float32") -> str:
    """Import TensorFlow, quietly and set up for the machine and the program, and return the device's name."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["KERAS_BACKEND"] = "tensorflow"  # and below, whatever ~/.keras/keras.json says
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # TensorFlow's C++ code prints there before any setting can prevent it
    try:
        import keras
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    tf.get_logger().setLevel("ERROR")  # it warns that each phase compiles its own functions
    keras.config.set_image_data_format("channels_last")
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("mixed_bfloat16" if precision == "bfloat16" else "float32")
    with contextlib.suppress(RuntimeError):  # in a notebook, TensorFlow may have started before
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        if not gpus:
            # One operation at a time, so that sums have a fixed order, and equal runs equal bits. It costs 2 to 10 %.
            tf.config.threading.set_inter_op_parallelism_threads(1)
    if not gpus and Path("/proc/driver/nvidia/version").exists():
        report("TensorFlow doesn't see the NVIDIA GPU: pip install 'tensorflow[and-cuda]'", "Warning")
    return ", ".join(tf.config.experimental.get_device_details(gpu).get("device_name", "GPU") for gpu in gpus) or "CPU"


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns the exit code."""
    args = parse(argv)
    warnings.showwarning = lambda message, *details: report(str(message), "Warning")
    for number in (getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, lambda number, frame: sys.exit(128 + number))  # removes temporary files on the way
    mode = upscale if args.pretrained else evaluate if args.evaluate else export if args.export else train
    try:
        mode(args)
        return 0
    except (OSError, MemoryError) as error:  # data.UserError is one, too; any other is a bug and shows its traceback
        report(error)
    except KeyboardInterrupt:
        report("interrupted")
        return 130
    except ModuleNotFoundError as error:
        if error.name not in ("numpy", "PIL", "tqdm", "keras", "tensorflow", "tensorboard"):
            raise
        report(f"{error}: activate the environment, or run pip install -r requirements.txt")
    return 1 if "tensorflow" in sys.modules else 2


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="replace")
    sys.exit(main())
