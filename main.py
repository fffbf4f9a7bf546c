"""The command line of SRGAN (Ledig et al. 2017, arXiv:1609.04802): train, upscale, evaluate, export.

Flags and paths are checked before TensorFlow is imported, so `-h` and mistakes are answered at once. `-h` needs no
package at all: packages are imported where they are used. Exit codes: 0 done, 1 failed, 2 refused before any work, 128
plus the signal's number if interrupted. `python3 -X dev main.py` shows the traceback of a failure.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights"
RESULTS = ("srresnet.weights.h5", "srgan.weights.h5")  # of a run, in its folder
ERRORS = (OSError, ValueError, ArithmeticError, MemoryError)  # one line each; any other exception is a bug

# The flags that each mode takes. Without one of these modes, the program trains.
MODES = {
    "--pretrained": {"--input", "--output", "--weights", "--blend", "--ensemble", "--precision"},
    "--evaluate": {"--json", "--weights", "--blend", "--ensemble", "--precision"},
    "--export": {"--weights", "--blend"},
}
NOT_IN_TRAINING = set.union(*MODES.values()) - {"--weights", "--precision"}

# Options that can't change when a run is resumed, and those that can't once the GAN has begun.
KEPT_OPTIONS = ("BATCH_SIZE", "data_dir", "weights", "precision", "ema", "jpeg", "seed")
KEPT_BY_GAN = ("PREGENSTEPS", "vgg_layer")


def number(kind: type, low: float, high: float) -> Callable:
    """An argparse type: a `kind` from `low` to `high`."""

    def convert(text):
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what} from {low} to {high}, not {text}")

    return convert


def jpeg_qualities(text: str) -> str:
    """An argparse type: a range of JPEG qualities, as `LOW-HIGH`."""
    with contextlib.suppress(ValueError):
        low, high = map(int, text.split("-") if "-" in text else (text, text))
        if 1 <= low <= high <= 100:
            return f"{low}-{high}"
    raise argparse.ArgumentTypeError(f"must be two qualities from 1 to 100, as in 70-95, not {text}")


def make_parser() -> argparse.ArgumentParser:
    description = "Train SRGAN, or upscale images four times with it."
    parser = argparse.ArgumentParser(prog="main.py", description=description, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"main.py: {message}\n")  # one line, without the usage
    steps, interval = number(int, 0, 9_999_999), number(int, 1, 9_999_999)
    rate, share = number(float, 1e-12, 1), number(float, 0, 1)

    def add(flag, kind, metavar, default, help):
        kind = {"type": kind} if callable(kind) else {"choices": kind}
        help += f" (default: {default})" if default is not None else ""
        group.add_argument(flag, **kind, metavar=metavar, default=default, help=help)

    group = parser.add_argument_group("main flags")
    add("--STEPS", steps, "N", 2000, "GAN training steps; 0: only pre-train")
    add("--PREGENSTEPS", steps, "N", 2000, "generator pre-training steps; 0: only the GAN")
    add("--BATCH_SIZE", number(int, 1, 10**6), "N", 128, "patches per step, over all devices")
    add("--lr_pre_gen", rate, "RATE", 1e-4, "learning rate of the pre-training")
    add("--lr_gen", rate, "RATE", 1e-4, "learning rate of both networks in the GAN")
    group.add_argument("--pretrained", action="store_true", help="upscale --input to --output instead of training")

    group = parser.add_argument_group("upscaling, evaluation and export")
    add("--input", str, "PATH", "input.jpg", "an image, or a folder of images")
    add("--output", str, "PATH", "output.jpg", "the image to write, or a folder for the results")
    add("--evaluate", str, "DIR", None, "print PSNR and SSIM on the HR images in DIR, or in HR/ and LR_x4/ below it")
    add("--json", str, "FILE", None, "with --evaluate: also write the mean scores to FILE, if no image fails")
    add("--export", str, "PATH", None, "write the generator as a .tflite or .onnx file, or else a SavedModel folder")
    add("--weights", str, "FILE", None, "weights to use (default: weights/srgan.weights.h5), or to start training from")
    add("--blend", share, "A", None, "mix the weights of SRResNet (0) and SRGAN (1): low values invent less detail")
    help = "average over the eight flips and rotations: better, eight times slower"
    group.add_argument("--ensemble", action="store_true", help=help)

    group = parser.add_argument_group("training")
    add("--data_dir", str, "DIR", None, "photos, in train/ and valid/ or all in DIR (default: DIV2K, downloaded once)")
    add("--run_dir", str, "DIR", "runs/srgan", "checkpoints, logs and results; the same command resumes a run")
    layers = ("block2_conv2", "block3_conv4", "block5_conv4")
    add("--vgg_layer", layers, None, "block5_conv4", "VGG19 layer of the content loss")
    add("--vgg_weights", str, "FILE", None, "VGG19 weights (default: downloaded once by Keras)")
    help = "paper: a tenth in the second half of the GAN; cosine: down to 0; none: constant"
    add("--lr_decay", ("paper", "cosine", "none"), None, "paper", help)
    add("--precision", ("float32", "bfloat16"), None, "float32", "number format to train or upscale in")
    add("--ema", number(float, 0, 0.99999), "DECAY", 0, "average the generator's weights over the steps; 0: off")
    add("--jpeg", jpeg_qualities, "LOW-HIGH", None, "compress half of the LR patches as JPEG, with these qualities")
    add("--save_every", interval, "N", 100, "steps between checkpoints, which are at most five minutes apart")
    add("--eval_every", interval, "N", 100, "steps between validations")
    add("--seed", number(int, 0, 2**31 - 1), "N", 0, "seed of the initial weights and of the order of the data")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse `argv`. Exits with code 2 if a flag is wrong, or doesn't go with the mode."""
    parser = make_parser()
    args = parser.parse_args(argv)
    flags = sorted({word.partition("=")[0] for word in argv if word.startswith("--")})
    modes = [flag for flag in flags if flag in MODES]
    if len(modes) > 1:
        parser.error(f"{' and '.join(modes)} are different tasks: give one of them")
    for flag in flags:
        if getattr(args, flag[2:], None) == "":
            parser.error(f"{flag} is empty")
        if modes and flag not in MODES[modes[0]] | {modes[0]}:
            parser.error(f"{flag} can't be used with {modes[0]}")
        if not modes and flag in NOT_IN_TRAINING:
            parser.error(f"{flag} needs {' or '.join(mode for mode in MODES if flag in MODES[mode])}")
    if not modes and not args.STEPS and not args.PREGENSTEPS:
        parser.error("--STEPS 0 and --PREGENSTEPS 0: nothing to train")
    return args


# ----------------------------------------------- files, checked before TensorFlow is imported: OSError or ValueError


def must_exist(path: str | Path, what: str, kind: Callable = Path.is_file) -> Path:
    if not kind(Path(path)):
        raise FileNotFoundError(f"no such {what}: {path}")
    return Path(path)


def must_be_writable(path: Path) -> None:
    """Raise OSError if the file `path`, with any missing folders above it, can't be written."""
    if path.exists() and not path.is_file():
        raise OSError(f"can't write {path}: it is {'a folder' if path.is_dir() else 'not a regular file'}")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise PermissionError(f"can't write {path}: {above} is read-only or not a folder")


def find_weights(args: argparse.Namespace) -> list[Path]:
    """The weights files to load: one, or with `--blend` SRResNet's and SRGAN's."""
    weights = must_exist(args.weights or WEIGHTS / RESULTS[1], "weights file")
    if not weights.name.endswith(".weights.h5"):
        raise ValueError(f"the name of a weights file must end in .weights.h5, got {weights}")
    if args.blend is None:
        return [weights]
    srresnet = must_exist(weights.with_name(RESULTS[0]), "weights file, needed by --blend")
    if srresnet.samefile(weights):
        raise ValueError(f"--blend mixes {srresnet} with SRGAN's weights: give those as --weights")
    return [srresnet, weights]


def find_jobs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """The images to read, each with the file to write."""
    import data

    must_exist(source, "image or folder", Path.exists)
    if target.exists() and target.samefile(source):
        raise ValueError(f"--output {target} is --input, which is never overwritten: give another name")
    if not source.is_dir():
        must_be_writable(target)
        with data.open_image(source) as image:
            size = image.size
        data.check_output(target, *size)
        return [(source, target)]
    if target.suffix.lower() in data.SUFFIXES or target.is_file():
        raise ValueError(f"--input {source} is a folder: --output must be a folder, too, got {target}")
    images = data.list_images(source)
    if not images:
        raise ValueError(f"no images in {source}: supported are {' '.join(sorted(data.SUFFIXES))}")
    # GIF has too few colours: a.gif becomes a.gif.png.
    jobs = [(image, target / (image.name + ".png" * (image.suffix.lower() == ".gif"))) for image in images]
    if len({target for _, target in jobs}) < len(jobs):
        raise ValueError(f"{source} holds a GIF and its PNG, NAME.gif and NAME.gif.png: rename one of them")
    originals = {os.path.realpath(image) for image in images}
    if linked := [target for _, target in jobs if os.path.realpath(target) in originals]:
        raise ValueError(f"{linked[0]} is in --input, by a link, and never overwritten: give another --output")
    must_be_writable(jobs[0][1])
    return jobs


def find_pairs(folder: str, json_file: str | None) -> list[tuple[str, Path, Path | None]]:
    """The images to score, as `data.scoring_pairs`."""
    import data

    if json_file:
        must_be_writable(Path(json_file))
        if not json_file.endswith(".json"):
            raise ValueError(f"the name of the --json file must end in .json, got {json_file}")
    return data.scoring_pairs(must_exist(folder, "folder", Path.is_dir))


def check_export(target: Path) -> None:
    if target.suffix.lower() == ".onnx" and not importlib.util.find_spec("tf2onnx"):
        raise ValueError("exporting to ONNX needs a package that is not installed: pip install tf2onnx")
    if target.suffix.lower() in (".tflite", ".onnx"):
        return must_be_writable(target)
    must_be_writable(target / "saved_model.pb")
    names = {path.name for path in target.iterdir()} if target.exists() else set()
    if names and not {"saved_model.pb"} <= names <= {"saved_model.pb", "fingerprint.pb", "assets", "variables"}:
        raise ValueError(f"--export {target} is a folder with files that are not a SavedModel's: give another name")


def check_training(args: argparse.Namespace) -> None:
    if any(character in args.run_dir for character in "[\\" if character != os.sep):
        raise ValueError(f"--run_dir {args.run_dir}: TensorFlow reads [ and \\ as a pattern, choose another name")
    for name in RESULTS:
        must_be_writable(Path(args.run_dir) / name)
    if args.data_dir:
        must_exist(args.data_dir, "folder", Path.is_dir)
    if args.vgg_weights and args.STEPS:
        must_exist(args.vgg_weights, "VGG19 weights file")
    if args.weights:
        find_weights(args)
    elif not args.PREGENSTEPS:
        what = "weights file to start the GAN from (give --weights, or --PREGENSTEPS above 0)"
        must_exist(Path(args.run_dir) / RESULTS[0], what)
    check_resuming(Path(args.run_dir), args)


def check_resuming(run_dir: Path, args: argparse.Namespace) -> None:
    """Raise ValueError if the run has checkpoints but was started with other options."""
    file, checkpoints = run_dir / "options.json", run_dir / "checkpoints"
    if not any(checkpoints.glob("*-*[0-9]")) or not file.exists():
        return
    try:
        before = {**json.loads(file.read_text())}  # TypeError if it isn't a dict
    except (TypeError, ValueError):
        raise ValueError(f"{file} doesn't hold the options of a run: give another --run_dir") from None
    for name in KEPT_OPTIONS + KEPT_BY_GAN * any(checkpoints.glob("gan-*[0-9]")):
        values = before.get(name), getattr(args, name)
        if name in ("data_dir", "weights"):
            values = [value and os.path.realpath(str(value)) for value in values]
        if values[0] != values[1]:
            old, new = (f"without --{name}" if value is None else f"with --{name} {value}" for value in values)
            raise ValueError(f"the run in {run_dir} was started {old}, not {new}: use the same, or another --run_dir")


# ---------------------------------------------------------------------------------------------------------- the modes


def upscale(args: argparse.Namespace, weights: list[Path], jobs: list[tuple[Path, Path]]) -> int:
    """`--pretrained`: write each image four times larger. Returns the exit code."""
    from tqdm import tqdm

    import model

    upscaler = model.make_upscaler(model.load_generator(weights, args.blend, args.precision), args.ensemble)
    failed = 0
    for source, target in tqdm(jobs, unit="image", disable=len(jobs) == 1):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            tqdm.write(upscale_image(upscaler, source, target))
        except ERRORS as error:
            report(error)
            failed += 1
    return exit_code(failed, len(jobs))


def upscale_image(upscaler: Callable, source: Path, target: Path) -> str:
    """From file to file. Returns a line about the result. Raises OSError or ValueError."""
    from tqdm import tqdm

    import data

    image = data.read_image(source)
    height, width, _ = image.pixels.shape
    data.check_output(target, width, height)
    if image.alpha is not None:
        image.pixels = data.spread_colours(image.pixels, image.alpha)
        image.alpha = data.bicubic(image.alpha)
    size = {"total": height * width, "unit": "px", "unit_scale": True}
    with tqdm(desc=source.name, **size, leave=False, delay=3, disable=None) as bar:
        image.pixels = upscaler(image.pixels, bar.update)
    data.write_image(target, image)
    return f"{target}: {data.SCALE * width}x{data.SCALE * height}"


def evaluate(args: argparse.Namespace, weights: list[Path], pairs: list[tuple[str, Path, Path | None]]) -> int:
    """`--evaluate`: print PSNR and SSIM of bicubic and of the model for each image. Returns the exit code."""
    import numpy as np

    import data
    import losses
    import model

    def row(name, scores):
        print(f"{name[:24]:24}" + "  ".join(f"{psnr:7.2f}  {ssim:.4f}" for psnr, ssim in scores))

    upscaler = model.make_upscaler(model.load_generator(weights, args.blend, args.precision), args.ensemble)
    print(f"{'':24}      bicubic          model\n{'':24}   PSNR    SSIM     PSNR    SSIM")
    table = []  # (images, 2, 2): bicubic and model, PSNR and SSIM
    for name, hr_path, lr_path in pairs:
        try:
            lr, hr = data.read_pair(hr_path, lr_path)
            table.append([(losses.psnr(sr, hr), losses.ssim(sr, hr)) for sr in (data.bicubic(lr), upscaler(lr))])
            row(name, table[-1])
        except ERRORS as error:
            report(error)
    if table:
        row(f"mean of {len(table)}", means := np.mean(table, axis=0))
    if args.json and len(table) == len(pairs):
        scores = {name: dict(zip(("psnr", "ssim"), mean)) for name, mean in zip(("bicubic", "model"), means.tolist())}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        with data.atomic_write(args.json) as temporary:
            temporary.write_text(json.dumps(scores, indent=2) + "\n")
    return exit_code(len(pairs) - len(table), len(pairs))


def export(args: argparse.Namespace, weights: list[Path]) -> None:
    """`--export`: write the generator for other programs."""
    import model

    model.export(model.load_generator(weights, args.blend), args.export)
    print(f"exported to {args.export}")


def train(args: argparse.Namespace) -> None:
    import train

    train.train(args)


# -------------------------------------------------------------------------------------------------------- the program


def report(message: Exception | str, label: str = "main.py") -> None:
    """Print one line on stderr, after a label."""
    if sys.flags.dev_mode and isinstance(message, Exception):
        traceback.print_exception(message)
    if isinstance(message, OSError) and message.filename:
        message = f"{message.filename}: {message.strerror}"
    write = sys.modules["tqdm"].tqdm.write if "tqdm" in sys.modules else print  # above the progress bar
    write(f"{label}: {' '.join(str(message).split()) or 'out of memory'}", file=sys.stderr)


def exit_code(failed: int, count: int) -> int:
    if failed and count > 1:
        report(f"{failed} of {count} images failed")
    return 1 if failed else 0


class Stream(io.FileIO):
    """Standard output or error: if nobody reads it (any more), the work goes on."""

    def write(self, text):
        with contextlib.suppress(OSError):
            return super().write(text)
        return len(text)


def open_streams() -> None:
    """Make printing never fail: closed pipes and streams are ignored, characters that can't be encoded replaced."""
    while os.open(os.devnull, os.O_RDWR) <= 2:  # takes the place of a closed stream
        pass
    for number, name in ((1, "stdout"), (2, "stderr")):
        encoding = getattr(getattr(sys, name), "encoding", None)
        file = io.BufferedWriter(Stream(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(file, encoding, errors="replace", line_buffering=True))


def start_tensorflow() -> str:
    """Import TensorFlow, quietly and set up for the machine. Returns the device's name.

    Its C++ code prints to stderr before any setting can prevent it, hence the detour of file descriptor 2.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if not gpus and Path("/proc/driver/nvidia/version").exists():
        print("Warning: TensorFlow doesn't see the NVIDIA GPU: pip install 'tensorflow[and-cuda]'", file=sys.stderr)
    names = [tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name) for gpu in gpus]
    return ", ".join(names) or f"CPU with {os.cpu_count()} cores"


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns the exit code."""
    warnings.showwarning = lambda message, *details: report(str(message), "Warning")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # removes temporary files on the way
    code = 2
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if args.pretrained:
            task = partial(upscale, args, find_weights(args), find_jobs(Path(args.input), Path(args.output)))
        elif args.evaluate:
            task = partial(evaluate, args, find_weights(args), find_pairs(args.evaluate, args.json))
        elif args.export:
            check_export(Path(args.export))
            task = partial(export, args, find_weights(args))
        else:
            check_training(args)
            # oneDNN: off by default without AVX-512. There it speeds up training 1.8 times, but slows upscaling a lot.
            os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
            task = partial(train, args)
        code = 1
        print(f"Running on {start_tensorflow()}", flush=True)
        return task() or 0
    except KeyboardInterrupt:
        return 130
    except ImportError as error:
        report(f"{error}: activate the environment, or run pip install -r requirements.txt")
        return code
    except ERRORS as error:
        report(error)
        return code


if __name__ == "__main__":
    open_streams()
    sys.exit(main())
