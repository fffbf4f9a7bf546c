"""The command line of SRGAN (Ledig et al. 2017, arXiv:1609.04802): train, upscale, evaluate, export.

Flags and paths are checked before TensorFlow is imported, and `-h` needs no package: all are imported where they are
used. Exit codes: 0 done, 1 failed, 2 refused before any work, 128 plus the signal's number if interrupted.
"""

import argparse
import collections
import contextlib
import errno
import importlib.util
import os
import signal
import sys
import threading
import warnings
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights" / "srgan.weights.h5"
# The flags of `--recipe release`. The weights in weights/ were made with others like these: see weights/README.md.
RELEASE = (
    "--PREGENSTEPS 34000 --STEPS 7000 --finish 300 --BATCH_SIZE 64 --lr_pre_gen 6e-4 --lr_gen 2e-4 --lr_decay cosine "
    "--vgg_layer block3_conv4 --adversarial 1e-2 --colour 10 --penalty 0.1 --mesh 0.3 "
    "--jpeg 60-95 --ema 0.999"
)
# The flags that go with each mode, beside its own. Without one of these modes, the program trains.
MODES = {
    "pretrained": {"input", "output", "format", "skip_existing", "weights", "blend", "ensemble", "precision"},
    "evaluate": {"weights", "blend", "ensemble", "precision"},
    "export": {"weights", "blend"},
}
TRAINING_TOO = {"weights", "precision"}  # of these flags, the ones that also go with training
STOPPING_SIGNALS = ("SIGTERM", "SIGHUP", "SIGUSR1")  # the last from Slurm, before a job's time is up
RESULTS_IN_MEMORY = 10**9  # bytes of results that wait to be written, at most, or else one result


# ---- Flags ----


def bounded(kind, low, high):
    """An argparse type: a `kind` from `low` to `high`."""

    def convert(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high:
                return value
        name = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"must be a {name} from {low} to {high}, not {text}")

    return convert


def jpeg_qualities(text):
    """An argparse type: a range of JPEG qualities, as `LOW-HIGH`, or one quality."""
    low, _, high = text.partition("-")
    if "-" not in text:
        high = low
    if low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high) <= 100:
        return f"{int(low)}-{int(high)}"
    raise argparse.ArgumentTypeError(f"must be one or two qualities from 1 to 100, as in 70-95, not {text}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train SRGAN, or upscale images 4x with it.", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"main.py: {message}\n")  # one line, without the usage
    steps = bounded(int, 0, 9_999_999)
    interval = bounded(int, 1, 9_999_999)
    rate = bounded(float, 1e-12, 1)
    weight = bounded(float, 0, 1e6)

    def add(group, flag, kind, metavar, default, help):
        if default is not None:
            help = f"{help} (default: {default})"
        if isinstance(kind, tuple):
            group.add_argument(flag, choices=kind, default=default, help=help)
        else:
            group.add_argument(flag, type=kind, metavar=metavar, default=default, help=help)

    group = parser.add_argument_group("main flags")
    add(group, "--STEPS", steps, "N", 2000, "GAN training steps; 0: none; more extend a run, at a longer run's rate")
    add(group, "--PREGENSTEPS", steps, "N", 2000, "generator pre-training steps; 0: none")
    add(group, "--BATCH_SIZE", bounded(int, 1, 10**6), "N", 128, "patches per step, over all devices")
    add(group, "--lr_pre_gen", rate, "RATE", 1e-4, "learning rate of the pre-training")
    add(group, "--lr_gen", rate, "RATE", 1e-4, "learning rate of the GAN, of both networks")
    modes = group.add_mutually_exclusive_group()
    modes.add_argument("--pretrained", action="store_true", help="upscale --input to --output instead of training")
    add(modes, "--evaluate", str, "DIR", None, "print PSNR and SSIM on the images in DIR, or in its HR/ and LR_x4/")
    add(modes, "--export", str, "PATH", None, "write the generator as .tflite, .onnx, or else a SavedModel folder")

    group = parser.add_argument_group("upscaling, evaluation and export")
    add(group, "--input", str, "PATH", None, "image, or folder of images (default: input.jpg)")
    add(
        group,
        "--output",
        str,
        "PATH",
        None,
        "image or folder; follows links, refuses write-protected files (default: output.jpg)",
    )
    add(group, "--format", str, "NAME", None, "format of the results in a folder, as png (default: each image's own)")
    group.add_argument("--skip_existing", action="store_true", help="skip images whose results are whole and newer")
    add(group, "--weights", str, "FILE", None, f"weights to use (default: weights/{WEIGHTS.name}), or to train from")
    add(group, "--blend", bounded(float, 0, 1), "A", None, "mix SRResNet (0) and SRGAN (1): low values invent less")
    group.add_argument("--ensemble", action="store_true", help="average eight flips and rotations: smoother, slower")

    group = parser.add_argument_group("training")
    add(group, "--recipe", ("paper", "release"), None, "paper", "release: flags like those of the weights in weights/")
    add(group, "--data_dir", str, "DIR", None, "photos, in train/ and valid/ or in DIR (default: DIV2K, downloaded)")
    add(group, "--run_dir", str, "DIR", "runs/srgan", "checkpoints, logs and results; the same command resumes a run")
    add(group, "--cache_dir", str, "DIR", None, "for DIV2K and decoded photos (default: data/, or else ~/.cache/srgan)")
    vgg_layers = ("block2_conv2", "block3_conv4", "block5_conv4")
    add(group, "--vgg_layer", vgg_layers, None, "block5_conv4", "VGG19's layer for the content loss")
    add(group, "--vgg_weights", str, "FILE", None, "VGG19 weights (default: downloaded once by Keras)")
    add(group, "--adversarial", weight, "W", 1e-3, "weight of the adversarial loss, beside the content loss")
    add(group, "--colour", weight, "W", 0.0, "weight of the colour loss")
    add(group, "--penalty", weight, "W", 0.0, "weight of the gradient penalty in the discriminator's loss")
    add(group, "--mesh", weight, "W", 0.0, "weight of the mesh loss, where there is no discriminator")
    add(group, "--finish", steps, "N", 0, "steps after the GAN's, without a discriminator; 0: none")
    decays = ("paper", "cosine", "none")
    add(group, "--lr_decay", decays, None, "paper", "paper: a tenth in the 2nd half of GAN and finish; cosine: to 0")
    add(group, "--precision", ("float32", "bfloat16"), None, "float32", "number format to train or upscale in")
    add(group, "--ema", bounded(float, 0, 0.99999), "DECAY", 0.0, "average the generator's weights over steps; 0: off")
    add(group, "--jpeg", jpeg_qualities, "LOW-HIGH", None, "save half of the LR patches as JPEG, with these qualities")
    add(group, "--save_every", interval, "N", 1000, "steps between checkpoints, which are at most five minutes apart")
    add(group, "--eval_every", interval, "N", 500, "steps between validations")
    add(group, "--seed", bounded(int, 0, 2**31 - 1), "N", 0, "seed of the initial weights and the order of the data")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Exits with code 2 if a flag is wrong, or doesn't go with the mode."""
    if argv is None:
        argv = sys.argv[1:]
    parser = make_parser()
    args = parser.parse_args(argv)
    # Once more, without the defaults: what is not on the command line stays None.
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))
    if args.recipe == "release":
        args = parser.parse_args(RELEASE.split() + argv)
    args.mode = None
    for mode in MODES:
        if getattr(args, mode):
            args.mode = mode

    for name, value in vars(given).items():
        if value == "":
            parser.error(f"--{name} is empty")
        if value is not None:
            check_mode(parser, name, args.mode)
    for name in ("input", "evaluate", "weights", "data_dir", "vgg_weights"):
        path = getattr(args, name)
        if path is not None and not os.path.exists(path):
            parser.error(f"no such file or folder: {path}")
    if args.mode is None:
        check_training(parser, args)
    else:
        args.weights = Path(args.weights or WEIGHTS)
    if args.mode == "export":
        check_export(parser, args.export)
    return args


def check_mode(parser, name, mode):
    """Refuse a flag that does nothing in a mode."""
    if mode is None:
        modes = [f"--{other}" for other in MODES if name in MODES[other]]
        if modes and name not in TRAINING_TOO:
            parser.error(f"--{name} needs {' or '.join(modes)}")
    elif name != mode and name not in MODES[mode]:
        parser.error(f"--{name} can't be used with --{mode}")


def check_training(parser, args):
    if not (args.STEPS or args.PREGENSTEPS or args.finish):
        parser.error("--STEPS 0 --PREGENSTEPS 0: nothing to train")
    srresnet = f"{args.run_dir}/srresnet.weights.h5"
    if not (args.PREGENSTEPS or args.weights or os.path.exists(srresnet)):
        parser.error(f"--PREGENSTEPS 0 needs --weights, or {srresnet}")
    if "[" in args.run_dir or (os.sep != "\\" and "\\" in args.run_dir):
        parser.error(f"--run_dir {args.run_dir}: TensorFlow reads [ and \\ as a pattern, choose another name")
    if not args.run_dir.isprintable():
        parser.error(f"--run_dir {args.run_dir!a} has characters that can't be printed: choose another name")


def check_export(parser, path):
    name = Path(path).name
    suffix = Path(path).suffix.lower()
    if "." in name and suffix not in (".tflite", ".onnx"):
        parser.error(f"--export {path} must end in .tflite or .onnx, or be a folder's name without a dot")
    if os.path.isdir(path) or (suffix == "" and os.path.exists(path)):
        parser.error(f"--export {path} exists: give another name")
    if suffix == ".onnx" and not importlib.util.find_spec("tf2onnx"):
        parser.error("exporting to ONNX needs a package that is not installed: pip install tf2onnx")


# ---- Messages ----


class LastingStream:
    """A standard stream whose reader may go away, as in `| head`: the rest is dropped, and the work goes on.

    `harmless` are the numbers of the errors after which it does so. Others are raised, once.
    """

    def __init__(self, stream, *harmless):
        self.stream = stream or open(os.devnull, "w")  # None, if it was closed from the start
        self.harmless = harmless

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with self.dropping():
            self.stream.write(text)
        return len(text)

    def flush(self):
        with self.dropping():
            self.stream.flush()

    @contextlib.contextmanager
    def dropping(self):
        try:
            yield
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            if error.errno not in self.harmless:
                raise


thread_warnings = threading.local()  # `collected`: the list that gets this thread's warnings, if there is one


@contextlib.contextmanager
def collect_warnings(collected: list):
    """Let the warnings of this thread go to a list instead of the terminal."""
    thread_warnings.collected = collected
    try:
        yield
    finally:
        del thread_warnings.collected


def show_warning(message, *details):
    """Takes the place of `warnings.showwarning`."""
    if hasattr(thread_warnings, "collected"):
        thread_warnings.collected.append(str(message))
    else:
        report(str(message), "Warning")


def report(message, label="main.py"):
    """Print one line on stderr, after a label."""
    if isinstance(message, OSError) and message.filename:
        message = f"{message.filename}: {message.strerror}"
    line = " ".join(str(message).split()) or "out of memory"
    write = print
    if "tqdm" in sys.modules:
        write = sys.modules["tqdm"].tqdm.write  # above the progress bar
    write(f"{label}: {line}", file=sys.stderr)


# ---- TensorFlow ----


@contextlib.contextmanager
def quiet_stderr():
    """TensorFlow's C++ code prints on stderr before any setting can prevent it."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def start_tensorflow(precision="float32"):
    """Import TensorFlow and Keras, quietly and set up for the machine and the program. Prints the device."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ["KERAS_HOME"] = os.devnull  # the user's keras.json is for other programs
    with quiet_stderr():
        import keras
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
    tf.get_logger().setLevel("ERROR")  # it warns that each phase compiles its own functions
    keras.config.set_dtype_policy("mixed_bfloat16" if precision == "bfloat16" else "float32")
    with contextlib.suppress(RuntimeError):  # in a notebook, TensorFlow may have started before
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        if not gpus:
            # One operation at a time, so that sums have a fixed order, and equal runs equal bits. It costs 2 to 10 %.
            tf.config.threading.set_inter_op_parallelism_threads(1)
    if not gpus and Path("/proc/driver/nvidia/version").exists():
        report("TensorFlow doesn't see the NVIDIA GPU: pip install 'tensorflow[and-cuda]'", "Warning")
    print(f"Running on {device_names()}", flush=True)


def device_names() -> str:
    import tensorflow as tf

    names = []
    for gpu in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        names.append(details.get("device_name", "GPU"))
    return ", ".join(names) or "CPU"


def load_generator(args):
    """The generator with the weights that the command line asks for. Raises OSError."""
    import data
    import model

    if args.blend is None:
        return model.load_generator(args.weights)
    srresnet = args.weights.with_name("srresnet.weights.h5")
    if not srresnet.exists():
        srresnet = WEIGHTS.with_name("srresnet.weights.h5")
    if srresnet.samefile(args.weights):
        raise data.UserError(f"--blend mixes {srresnet} with SRGAN's weights: give those as --weights")
    print(f"Mixing {args.weights} with {srresnet}", flush=True)
    return model.load_generator(args.weights, srresnet, args.blend)


# ---- Upscaling ----


def find_jobs(source: str, output: str, format: str | None = None) -> list[tuple[Path, Path]]:
    """The images to read, each with the file to write, whose folder it makes. Raises OSError if it can't be written."""
    import data

    source = Path(source)
    target = Path(output)
    suffix = None
    if format:
        suffix = f".{format.lower().removeprefix('.')}"
        if suffix not in data.SUFFIXES:
            raise data.UserError(f"--format {format} is not one of {' '.join(sorted(data.SUFFIXES))}")
    if source.is_dir():
        if target.suffix.lower() in data.SUFFIXES or target.is_file():
            raise data.UserError(f"--input {source} is a folder: --output must be a folder, too, not {target}")
        images = data.list_images(source)
        into_folder = True
    else:
        images = [source]
        into_folder = output.endswith("/") or target.is_dir()
    if suffix and not into_folder:
        raise data.UserError(f"--format is for results in a folder: --output {target} has its format in its name")

    jobs = []
    for image in images:
        result = target
        if into_folder:
            result = target / image.name
        if suffix:
            result = result.with_suffix(suffix)
        jobs.append((image, result))
    check_jobs(jobs)
    return jobs


def check_jobs(jobs):
    """Make the folder of the results. Raises OSError if a result can't be written, or would replace an image."""
    import data

    if len(jobs) == 1:
        source, target = jobs[0]
        with data.open_image(source) as (_, image):
            width, height = image.size
        data.check_output(target, width, height)
    originals = {os.path.realpath(source) for source, _ in jobs}
    sources = {}
    for source, target in jobs:
        file = os.path.realpath(target)
        if file in originals:
            raise data.UserError(f"--output {target} is also an input, and inputs are never overwritten")
        if file in sources:
            raise data.UserError(f"{sources[file]} and {source} would both become {target}")
        sources[file] = source
    result = jobs[0][1]
    folder = result.parent  # of all results
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise data.UserError(f"can't write {result}: {folder} is read-only")


def is_done(source: Path, target: Path, weights: Path) -> bool:
    """Whether a result is whole, and newer than its image and the weights."""
    import data

    try:
        if target.stat().st_mtime <= max(source.stat().st_mtime, weights.stat().st_mtime):
            return False
        with data.open_image(source) as (_, image):
            size = sorted(data.SCALE * side for side in image.size)  # perhaps not upright
        with data.open_image(target) as (_, result):
            result.load()
            return sorted(result.size) == size
    except OSError:
        return False


class Job:
    """An image on its way from file to file."""

    def __init__(self, source: Path, target: Path):
        self.source = source
        self.target = target
        self.result_bytes = 0
        self.warnings = []  # printed when its turn comes
        self.written = Future()

    def read(self):
        """Returns pixels, the result's alpha or None, and metadata. Raises OSError."""
        import data

        with collect_warnings(self.warnings):
            pixels, alpha, metadata = data.read_image(self.source)
            height, width, _ = pixels.shape
            data.check_output(self.target, width, height)
            self.result_bytes = data.SCALE**2 * pixels.nbytes
            if alpha is not None:
                pixels = data.spread_colours(pixels, alpha)
                alpha = data.bicubic(alpha)
                self.result_bytes += alpha.nbytes
            return pixels, alpha, metadata

    def upscale(self, image: Future, upscaler, writers: ThreadPoolExecutor):
        """Upscale the image that was read, and hand it to the writers."""
        try:
            pixels, alpha, metadata = image.result()
            sr = upscaler(pixels)
        except (OSError, MemoryError) as error:
            self.written.set_exception(error)
        else:
            self.written = writers.submit(self.write, sr, alpha, metadata)

    def write(self, sr, alpha, metadata):
        """Returns a line that tells what was written. Raises OSError."""
        import data

        with collect_warnings(self.warnings):
            data.write_image(self.target, sr, alpha, metadata)
        height, width, _ = sr.shape
        return f"{self.target}: {width}x{height}"


def upscale_all(jobs: list[Job], upscaler) -> int:
    """Upscale images, while the next one is read and earlier ones are written. Returns how many failed.

    Messages come in the order of the images. The error of an only image is raised. Whatever stops the program, files
    that are being written get whole.
    """
    from tqdm import tqdm

    reader = ThreadPoolExecutor(1)
    writers = ThreadPoolExecutor(os.cpu_count())
    unfinished = collections.deque()
    failed = 0

    def finish_oldest():
        nonlocal failed
        job = unfinished.popleft()
        error = job.written.exception()  # waits until it is written
        for line in job.warnings:
            if job.source.name not in line and job.target.name not in line:  # Pillow's
                line = f"{job.source}: {line}"
            report(line, "Warning")
        if error is None:
            tqdm.write(job.written.result())
        elif isinstance(error, (OSError, MemoryError)) and len(jobs) > 1:
            report(error)
            failed += 1
        else:
            raise error
        bar.update()

    def waiting_bytes():
        return sum(job.result_bytes for job in unfinished if not job.written.done())

    bar = tqdm(total=len(jobs), unit="image", disable=True if len(jobs) == 1 else None)  # None: only on a terminal
    try:
        coming = reader.submit(jobs[0].read)
        for job, following in zip(jobs, [*jobs[1:], None]):
            image = coming
            if following:
                coming = reader.submit(following.read)
            wait([image])
            while unfinished and waiting_bytes() + job.result_bytes > RESULTS_IN_MEMORY:
                finish_oldest()
            job.upscale(image, upscaler, writers)
            unfinished.append(job)
            while unfinished and unfinished[0].written.done():
                finish_oldest()
        while unfinished:
            finish_oldest()
    finally:
        reader.shutdown(cancel_futures=True)
        writers.shutdown(cancel_futures=True)
        bar.close()
    return failed


# ---- Modes ----


def run_upscaling(args):
    """`--pretrained`: write each image four times larger. Raises OSError if some failed, after the others."""
    import data

    jobs = find_jobs(args.input or "input.jpg", args.output or "output.jpg", args.format)
    todo = jobs
    if args.skip_existing:
        todo = [(source, target) for source, target in jobs if not is_done(source, target, args.weights)]
        print(f"{len(jobs) - len(todo)} of {len(jobs)} images skipped: their results are whole and newer")
    if not todo:
        return
    start_tensorflow(args.precision)
    import model

    upscaler = model.Upscaler(load_generator(args), args.ensemble)
    failed = upscale_all([Job(source, target) for source, target in todo], upscaler)
    if failed:
        raise data.UserError(f"{failed} of {len(todo)} images failed")


def run_evaluation(args):
    """`--evaluate`: print PSNR and SSIM of bicubic and of the model. Raises OSError if some images failed."""
    import data

    pairs = data.scoring_pairs(args.evaluate)
    start_tensorflow(args.precision)
    import losses
    import model

    upscaler = model.Upscaler(load_generator(args), args.ensemble)
    table = []

    def print_row(name, scores):
        print("{:24.24}{:7.2f}  {:.4f}  {:7.2f}  {:.4f}".format(name, *scores))

    print(f"{'':24}      bicubic          model")
    print(f"{'':24}   PSNR    SSIM     PSNR    SSIM")
    for name, hr_path, lr_path in pairs:
        try:
            lr, hr = data.read_pair(hr_path, lr_path)
        except OSError as error:
            if len(pairs) == 1:
                raise
            report(error)
            continue
        scores = []
        for sr in (data.bicubic(lr), upscaler(lr)):
            sr = sr[..., : hr.shape[2]]  # a grey original has one channel
            scores += [losses.psnr(sr, hr), losses.ssim(sr, hr)]
        print_row(name, scores)
        table.append(scores)
    if table:
        means = [sum(column) / len(table) for column in zip(*table)]
        print_row(f"mean of {len(table)}", means)
    if len(table) < len(pairs):
        raise data.UserError(f"{len(pairs) - len(table)} of {len(pairs)} images failed")


def run_export(args):
    """`--export`: write the generator for other programs."""
    start_tensorflow()
    import data
    import model

    network = load_generator(args)
    with data.atomic_write(args.export) as temporary:
        model.export(network, temporary)
    print(f"exported to {args.export}")


def run_training(args):
    """Train SRResNet, then SRGAN."""
    # Without AVX-512, oneDNN is off by default: it speeds up training 1.8 times, but slows upscaling a lot.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    start_tensorflow(args.precision)
    import train

    train.train(args)


def exit_by_signal(number, frame):
    sys.exit(128 + number)  # removes temporary files on the way


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns the exit code."""
    args = parse(argv)
    warnings.showwarning = show_warning
    warnings.simplefilter("always", UserWarning)  # each image's, even if equal
    for name in STOPPING_SIGNALS:
        number = getattr(signal, name, None)  # not all are on Windows
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, exit_by_signal)
    modes = {"pretrained": run_upscaling, "evaluate": run_evaluation, "export": run_export, None: run_training}
    try:
        modes[args.mode](args)
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
    return 1 if "tensorflow" in sys.modules else 2  # it is imported when all is checked


def open_standard_streams():
    """Let files that the program opens never get the number of a standard stream that was closed, as by `2>&-`."""
    number = 0
    while number <= 2:
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)


if __name__ == "__main__":
    open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="replace")
    closed = (errno.EPIPE, errno.EIO)  # a pipe, a terminal
    stdout = LastingStream(sys.stdout, *closed)
    stderr = LastingStream(sys.stderr, *closed, errno.ENOSPC)  # work matters more than messages
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            exit_code = main()
        except SystemExit as stop:
            exit_code = stop.code
        try:
            stdout.flush()
        except OSError as error:
            report(error)
            exit_code = 1
    sys.exit(exit_code)
