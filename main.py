"""SRGAN from the command line: train it, upscale pictures with it, score it (Ledig et al. 2017, arXiv:1609.04802).

Every flag is checked here before TensorFlow is imported, so that `-h` and a mistake answer at once. Exit codes: 0 done,
1 failed on the way, 2 refused before any work, 130 interrupted. `python3 -X dev main.py ...` shows the traceback of a failure.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights"
VGG_LAYERS = ("block2_conv2", "block3_conv4", "block5_conv4")
# what a run keeps from beginning to end; learning rates may change, and numbers of steps grow
KEPT_OPTIONS = ("BATCH_SIZE", "data_dir", "weights", "vgg_layer", "precision", "ema", "jpeg", "seed")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line and exit code 2, without argparse's page of usage."""
        self.exit(2, f"{self.prog}: {message}\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something: not those of switches, nor those which the text explains."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def number(kind, low, high=math.inf, low_excluded=False):
    """An argparse type: a finite `kind` from `low` to `high`."""

    def convert(text):
        value = kind(text)
        if not math.isfinite(value) or not low <= value <= high or (low_excluded and value == low):
            raise ValueError
        return value

    bounds = f"{'above' if low_excluded else 'from'} {low}" + (f" to {high}" if high < math.inf else "")
    convert.__name__ = f"{'whole number' if kind is int else 'number'} {bounds}"  # argparse: "invalid NAME value: ..."
    return convert


def quality_range(text):
    low, _, high = text.partition("-")
    low, high = int(low), int(high or low)
    if not 1 <= low <= high <= 100:
        raise ValueError
    return low, high


quality_range.__name__ = "JPEG quality range, 1 to 100,"


def make_parser():
    parser = Parser(
        prog="main.py",
        description="Train SRGAN, or upscale pictures four times with it (--pretrained).",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    whole, above_zero = number(int, 1), number(float, 0, low_excluded=True)
    add = parser.add_argument_group("main flags").add_argument
    add("--STEPS", type=number(int, 0), default=2000, metavar="N", help="GAN training steps; 0: only pre-train")
    add(
        "--PREGENSTEPS",
        type=number(int, 0),
        default=2000,
        metavar="N",
        help="generator pre-training steps; 0: only the GAN",
    )
    add("--BATCH_SIZE", type=whole, default=128, metavar="N", help="patches in a step, over all devices")
    add("--lr_pre_gen", type=above_zero, default=1e-4, metavar="RATE", help="learning rate of the pre-training")
    add("--lr_gen", type=above_zero, default=1e-4, metavar="RATE", help="learning rate of the GAN, both networks")
    add("--pretrained", action="store_true", help="upscale --input to --output instead of training")

    add = parser.add_argument_group("upscaling and scoring").add_argument
    add("--input", default="input.jpg", metavar="PATH", help="a picture, or a folder of pictures")
    add("--output", default="output.jpg", metavar="PATH", help="the picture to write, or a folder for the results")
    add(
        "--evaluate",
        metavar="DIR",
        help="score the weights beside bicubic on the HR pictures in DIR, or on HR/ and LR_x4/ below it",
    )
    add("--json", metavar="FILE", help="with --evaluate: write the mean scores there too")
    add(
        "--weights",
        metavar="FILE",
        help="generator weights: weights/srgan.weights.h5 if not given; in training, the weights to start from",
    )
    add("--ensemble", action="store_true", help="average over the eight flips and turns: better, eight times slower")
    add("--blend", type=number(float, 0, 1), metavar="A", help="mix SRResNet (0) and SRGAN (1): fewer invented details")

    add = parser.add_argument_group("training").add_argument
    add(
        "--data_dir",
        metavar="DIR",
        help="photos of your own, train/ and valid/ below DIR or all in it, or a DIV2K; not given: DIV2K, downloaded on first use",
    )
    add(
        "--run_dir",
        default="runs/srgan",
        metavar="DIR",
        help="checkpoints, TensorBoard logs and resulting weights; the same command continues a run",
    )
    add("--vgg_layer", default="block5_conv4", choices=VGG_LAYERS, help="VGG19 layer of the content loss")
    add("--vgg_weights", metavar="FILE", help="VGG19 weights; not given: Keras's download")
    add(
        "--lr_decay",
        default="paper",
        choices=("paper", "cosine", "none"),
        help="paper: constant, and a tenth for the second half of the GAN",
    )
    add("--precision", default="float32", choices=("float32", "bfloat16"), help="what the networks compute in")
    add(
        "--ema",
        type=number(float, 0, 0.99999),
        default=0,
        metavar="DECAY",
        help="average the generator's weights over the steps; 0: off",
    )
    add(
        "--jpeg",
        type=quality_range,
        metavar="LOW-HIGH",
        help="compress a half of the LR patches as JPEGs of these qualities",
    )
    add("--save_every", type=whole, default=100, metavar="N", help="steps between checkpoints; five minutes at most")
    add("--eval_every", type=whole, default=100, metavar="N", help="steps between validations")
    add(
        "--seed",
        type=number(int, 0, 2**31 - 1),
        default=0,
        metavar="N",
        help="of the starting weights and the order of the data",
    )
    return parser


def parse(argv):
    """Parse and check `argv`. A flag that is wrong, or that the chosen mode would ignore, exits with code 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    given = {word.partition("=")[0] for word in argv}

    def refuse(flags, mode, allowed):
        for flag in sorted(given.intersection(flags)):
            if not allowed:
                parser.error(f"{flag} goes with {mode}")

    if args.pretrained and args.evaluate:
        parser.error("--pretrained and --evaluate are two different things to do: give one of them")
    refuse(["--input", "--output"], "--pretrained", args.pretrained)
    refuse(["--json"], "--evaluate", args.evaluate)
    refuse(["--ensemble", "--blend"], "--pretrained or --evaluate", args.pretrained or args.evaluate)
    try:
        if args.pretrained or args.evaluate:
            check_generating(args)
        else:
            check_training(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return args


def must_exist(path, what, kind=Path.exists):
    if not kind(Path(path)):
        raise FileNotFoundError(f"no such {what}: {path}")


def check_generating(args):
    """Resolve the weights and the files, before anything slow. Raises OSError or ValueError."""
    if args.pretrained:
        must_exist(args.input, "picture or folder")
    else:
        must_exist(args.evaluate, "folder", Path.is_dir)
    args.weights = Path(args.weights or WEIGHTS / "srgan.weights.h5")
    must_exist(args.weights, "weights file", Path.is_file)
    if not args.weights.name.endswith(".weights.h5"):
        raise ValueError(f"the name of a weights file ends in .weights.h5, or Keras doesn't load it: {args.weights}")
    if args.blend is not None:
        must_exist(args.weights.with_name("srresnet.weights.h5"), "weights file, which --blend mixes in", Path.is_file)
    import data

    if args.pretrained:
        args.jobs = folder_jobs(args) if Path(args.input).is_dir() else picture_job(args)
        return
    args.pairs = data.scoring_pairs(args.evaluate)
    if args.json and (Path(args.json).is_dir() or not os.access(Path(args.json).parent, os.W_OK)):
        raise OSError(f"can't write {args.json}: it is a folder, or in none that can be written to")


def picture_job(args):
    """The file to read and the file to write: a list of one pair. Raises if the second can't be written."""
    from PIL import Image

    import data

    source, target = Path(args.input), Path(args.output)
    if target.exists() and target.samefile(source):
        raise ValueError(f"--output {target} is --input itself, which is never overwritten: give another name")
    try:
        with Image.open(source) as image:
            size = image.size
    except Exception as error:  # Pillow raises a dozen kinds on damaged files
        raise ValueError(f"{source} is not a picture") from error
    data.check_output(target, *(data.SCALE * side for side in size))
    return [(source, target)]


def folder_jobs(args):
    """The pictures in the folder to read, and the file to write for each: a list of pairs."""
    import data

    source, target = Path(args.input), Path(args.output)
    if target.suffix.lower() in data.SUFFIXES or (target.exists() and not target.is_dir()):
        raise ValueError(f"--input {source} is a folder: give a folder as --output, too")
    if target.exists() and target.samefile(source):
        raise ValueError(
            f"--output {target} is --input itself, whose pictures are never overwritten: give another folder"
        )
    above = next(folder for folder in [target, *target.absolute().parents] if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise PermissionError(f"can't write into {target}: {above} is read-only, or no folder")
    paths = data.list_images(source)
    if not paths:
        raise ValueError(f"no pictures in {source}: it takes {' '.join(sorted(data.SUFFIXES))}")
    jobs, names = [], {path.name for path in paths}
    for path in paths:
        name = path.name
        if path.suffix.lower() not in data.FORMATS:  # GIF has too few colours
            name = f"{path.stem}.png" if f"{path.stem}.png" not in names else f"{path.name}.png"
        jobs.append((path, target / name))
    return jobs


def check_training(args):
    if not args.STEPS and not args.PREGENSTEPS:
        raise ValueError("--STEPS 0 and --PREGENSTEPS 0: nothing to train")
    if args.weights:
        must_exist(args.weights, "weights file", Path.is_file)
        args.weights = str(Path(args.weights).resolve())  # a run remembers it
    if args.data_dir:
        must_exist(args.data_dir, "folder", Path.is_dir)
        args.data_dir = str(Path(args.data_dir).resolve())
    if args.vgg_weights and args.STEPS:
        must_exist(args.vgg_weights, "VGG19 weights file", Path.is_file)
    if not args.PREGENSTEPS and not args.weights:
        must_exist(
            Path(args.run_dir) / "srresnet.weights.h5",
            "SRResNet to start the GAN from (give --weights, or --PREGENSTEPS above 0)",
        )
    check_continuing(args)


def check_continuing(args):
    """Raise ValueError if the run in --run_dir was begun with options that matter and are others now."""
    run_dir = Path(args.run_dir)
    path = run_dir / "options.json"
    if not path.exists() or not any(run_dir.glob("checkpoints/*-*")):
        return
    before, now = json.loads(path.read_text()), json.loads(json.dumps(vars(args), default=str))
    for name in KEPT_OPTIONS + ("PREGENSTEPS",) * any(run_dir.glob("checkpoints/gan-*")):
        if before.get(name) != now[name]:
            raise ValueError(
                f"the run in {run_dir} was begun with --{name} {before.get(name)}, not {now[name]}: "
                "go on with that, or give another --run_dir"
            )


def load_upscaler(args):
    import model

    generator = model.generator()
    if args.blend is None:
        model.load_weights(generator, args.weights)
    else:
        model.load_blend(generator, args.weights.with_name("srresnet.weights.h5"), args.weights, args.blend)
    return model.make_upscaler(generator, args.ensemble)


def show_warnings_in_one_line():
    import warnings

    from PIL import Image
    from tqdm import tqdm

    warnings.showwarning = lambda message, *rest: tqdm.write(
        f"Warning: {' '.join(str(message).split())}", file=sys.stderr
    )
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # who names a huge picture means it


def upscale(args):
    """`--pretrained`: write the picture or pictures of --input, four times larger, to --output. Returns the exit code."""
    from tqdm import tqdm

    upscaler = load_upscaler(args)
    if not Path(args.input).is_dir():
        print(upscale_image(upscaler, *args.jobs[0]))
        return 0
    Path(args.output).mkdir(parents=True, exist_ok=True)
    failed = 0
    for source, target in tqdm(args.jobs, unit="picture"):
        try:
            upscale_image(upscaler, source, target)
        except (OSError, ValueError, MemoryError) as error:
            tqdm.write(f"main.py: {' '.join(str(error).split()) or 'out of memory'}", file=sys.stderr)
            failed += 1
    if failed:
        print(f"main.py: {failed} of {len(args.jobs)} pictures failed", file=sys.stderr)
    return 1 if failed else 0


def upscale_image(upscaler, source, target):
    """From file to file. Returns what became of it, in a line. Raises ValueError or OSError."""
    from tqdm import tqdm

    import data

    picture = data.read_image(source)
    height, width, _ = picture.pixels.shape
    data.check_output(target, data.SCALE * width, data.SCALE * height)
    if picture.alpha is not None:
        picture.pixels = data.spread_colours(picture.pixels, picture.alpha)
        picture.alpha = data.enlarge_alpha(picture.alpha)
    # shown when it takes more than a few seconds
    with tqdm(
        total=height * width, unit="px", unit_scale=True, desc=source.name, leave=False, delay=3, disable=None
    ) as bar:
        picture.pixels = upscaler(picture.pixels, bar.update)
    data.write_image(target, picture)
    return f"{target}: {data.SCALE * width}x{data.SCALE * height}"


def evaluate(args):
    """`--evaluate`: print PSNR and SSIM of bicubic and of the weights, picture by picture. Returns the exit code."""
    import numpy as np

    import data
    import losses

    upscaler = load_upscaler(args)
    print(f"{'':24}      bicubic          model")
    print(f"{'':24}   PSNR    SSIM     PSNR    SSIM")

    def row(name, scores):
        print(f"{name[:24]:24}" + "  ".join(f"{psnr:7.2f}  {ssim:.4f}" for psnr, ssim in scores), flush=True)

    table = []  # (pictures, 2, 2): bicubic and model, PSNR and SSIM
    for name, hr_path, lr_path in args.pairs:
        lr, hr = data.read_pair(hr_path, lr_path)
        table.append([(losses.psnr(sr, hr), losses.ssim(sr, hr)) for sr in (data.bicubic(lr), upscaler(lr))])
        row(name, table[-1])
    means = np.mean(table, axis=0)
    row(f"mean of {len(table)}", means)
    if args.json:
        scores = {
            name: {"psnr": float(psnr), "ssim": float(ssim)} for name, (psnr, ssim) in zip(("bicubic", "model"), means)
        }
        Path(args.json).write_text(json.dumps(scores, indent=2) + "\n")
    return 0


def start_tensorflow():
    """Import TensorFlow, quietly and set up for the machine. Returns the device's name.

    Its C++ side greets on stderr before any setting can keep it from it, hence the detour of file descriptor 2.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # off by default without AVX-512, and 2.5 times as fast
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


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        print(f"Running on {start_tensorflow()}")
        show_warnings_in_one_line()
        if args.pretrained:
            return upscale(args)
        if args.evaluate:
            return evaluate(args)
        import train

        try:
            train.train(args)
        except train.Interrupted as stop:
            print(stop)
            return stop.exit_code
        return 0
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, ArithmeticError, MemoryError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"main.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
