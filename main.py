"""SRGAN from the command line: train it, upscale pictures with it, score it (Ledig et al. 2017, arXiv:1609.04802).

Every flag is checked here before TensorFlow is imported, so that `-h` and a mistake answer at once. Exit codes: 0 done,
1 failed on the way, 2 refused before any work, 130 interrupted. `python3 -X dev main.py ...` shows the traceback of a failure.
"""

import argparse
import math
import os
import sys
from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights"
VGG_LAYERS = ("block2_conv2", "block3_conv4", "block5_conv4")


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
    add("--PREGENSTEPS", type=number(int, 0), default=2000, metavar="N", help="generator pre-training steps; 0: only the GAN")
    add("--BATCH_SIZE", type=whole, default=128, metavar="N", help="patches in a step, over all devices")
    add("--lr_pre_gen", type=above_zero, default=1e-4, metavar="RATE", help="learning rate of the pre-training")
    add("--lr_gen", type=above_zero, default=1e-4, metavar="RATE", help="learning rate of the GAN, both networks")
    add("--pretrained", action="store_true", help="upscale --input to --output instead of training")

    add = parser.add_argument_group("upscaling and scoring").add_argument
    add("--input", default="input.jpg", metavar="PATH", help="a picture, or a folder of pictures")
    add("--output", default="output.jpg", metavar="PATH", help="the picture to write, or a folder for the results")
    add("--evaluate", metavar="DIR", help="score the weights beside bicubic on the HR pictures in DIR, or on HR/ and LR_x4/ below it")
    add("--json", metavar="FILE", help="with --evaluate: write the mean scores there too")
    add("--weights", metavar="FILE", help="generator weights: weights/srgan.weights.h5 if not given; in training, the weights to start from")
    add("--ensemble", action="store_true", help="average over the eight flips and turns: better, eight times slower")
    add("--blend", type=number(float, 0, 1), metavar="A", help="mix SRResNet (0) and SRGAN (1): fewer invented details")

    add = parser.add_argument_group("training").add_argument
    add("--data_dir", metavar="DIR", help="photos of your own, train/ and valid/ below DIR or all in it, or a DIV2K; not given: DIV2K, downloaded on first use")
    add("--run_dir", default="runs/srgan", metavar="DIR", help="checkpoints, TensorBoard logs and resulting weights; the same command continues a run")
    add("--vgg_layer", default="block5_conv4", choices=VGG_LAYERS, help="VGG19 layer of the content loss")
    add("--vgg_weights", metavar="FILE", help="VGG19 weights; not given: Keras's download")
    add("--lr_decay", default="paper", choices=("paper", "cosine", "none"), help="paper: constant, and a tenth for the second half of the GAN")
    add("--precision", default="float32", choices=("float32", "bfloat16"), help="what the networks compute in")
    add("--ema", type=number(float, 0, 0.99999), default=0, metavar="DECAY", help="average the generator's weights over the steps; 0: off")
    add("--jpeg", type=quality_range, metavar="LOW-HIGH", help="compress a half of the LR patches as JPEGs of these qualities")
    add("--save_every", type=whole, default=100, metavar="N", help="steps between checkpoints")
    add("--eval_every", type=whole, default=100, metavar="N", help="steps between validations")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, metavar="N", help="of the starting weights and the order of the data")
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
    """Resolve the weights and look at the paths, before anything slow. Raises OSError or ValueError."""
    args.weights = Path(args.weights or WEIGHTS / "srgan.weights.h5")
    must_exist(args.weights, "weights file", Path.is_file)
    if args.blend is not None:
        must_exist(args.weights.with_name("srresnet.weights.h5"), "weights file, which --blend mixes in", Path.is_file)
    if args.pretrained:
        must_exist(args.input, "picture or folder")
    else:
        must_exist(args.evaluate, "folder", Path.is_dir)


def check_training(args):
    if not args.STEPS and not args.PREGENSTEPS:
        raise ValueError("--STEPS 0 and --PREGENSTEPS 0: nothing to train")
    if args.weights:
        must_exist(args.weights, "weights file", Path.is_file)
    if args.data_dir:
        must_exist(args.data_dir, "folder", Path.is_dir)
        args.data_dir = str(Path(args.data_dir).resolve())  # a run remembers it
    if args.vgg_weights and args.STEPS:
        must_exist(args.vgg_weights, "VGG19 weights file", Path.is_file)
    if not args.PREGENSTEPS and not args.weights:
        must_exist(Path(args.run_dir) / "srresnet.weights.h5", "SRResNet to start the GAN from (give --weights, or --PREGENSTEPS above 0)")


def upscale(args):
    """`--pretrained`: write the picture or pictures of --input, four times larger, to --output. Returns the exit code."""


def evaluate(args):
    """`--evaluate`: print PSNR and SSIM of bicubic and of the weights, picture by picture. Returns the exit code."""


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
        if args.pretrained:
            return upscale(args)
        if args.evaluate:
            return evaluate(args)
        import train

        return train.train(args)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, ArithmeticError, MemoryError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"main.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
