"""Make the README's figures in assets/ from a training run: python3 assets/figures.py RUN_DIR

The curves and the animation are drawn from TensorBoard's logs in RUN_DIR/logs, the networks from model.py, and the
comparison with the weights in weights/. Only the curves need matplotlib: pip install matplotlib
"""

import argparse
import importlib.util
import io
import itertools
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from main import start_tensorflow

NAMES = {"pretrain": "SRResNet", "gan": "SRGAN"}  # what the phases train

# -------------------------------------------------------------------------------------------------------- the networks

COLOURS = {  # fill and line
    "image": ("#f1f3f5", "#868e96"),
    "convolution": ("#d0e3fa", "#3b78c4"),
    "normalisation": ("#e9e1f8", "#8767c4"),
    "activation": ("#fde6c4", "#d98a1c"),
    "shuffle": ("#d3efd8", "#3f9a55"),
    "dense": ("#fad7dc", "#c94f63"),
}
WIDTH, HEIGHT = 880, 116  # of the drawing; of a box


def parts(network):
    """Yield the boxes of a network's drawing from its layers, in order: `(kind, text, label, image size)`.

    Only the first of the residual blocks is drawn, since they are all alike. Raises KeyError for an unknown layer.
    """
    texts = {
        "BatchNormalization": ("normalisation", "BN"),
        "PReLU": ("activation", "PReLU"),
        "LeakyReLU": ("activation", "Leaky ReLU"),
        "DepthToSpace": ("shuffle", "Pixel shuffle ×2"),
        "Add": ("sum", "+"),
    }
    scale = 1  # of the generator's features: its layers have no fixed size
    for layer in network.operations:
        name = type(layer).__name__
        if re.match(r"block(?!1_|1$)", layer.name) or name in ("Copy", "Rescaling", "Flatten"):
            continue
        size = f"{layer.output.shape[1]} × {layer.output.shape[2]}" if len(layer.output.shape) == 4 else ""
        if "None" in size:
            scale *= 1 + (name == "DepthToSpace")
            size = f"{scale}h × {scale}w".replace("1", "")  # h × w, 2h × 2w
        if name == "InputLayer":
            yield "image", {"lr": "LR", "hr": "HR or SR"}[layer.name], "", size
        elif name == "Conv2D":
            yield "convolution", "Conv", f"k{layer.kernel_size[0]}n{layer.filters}s{layer.strides[0]}", size
        elif name == "Dense":
            yield "dense", f"Dense ({layer.units})", "", size
        elif name == "ShufflePReLUConv":  # three boxes of the paper, in one layer because that is faster
            scale *= 2
            size = f"{scale}h × {scale}w"
            yield *texts["DepthToSpace"], "", size
            yield *texts["PReLU"], "", size
            yield "convolution", "Conv", f"k{layer.kernel.shape[0]}n{layer.kernel.shape[-1]}s1", size
        else:
            yield *texts[name], "", size
    yield "image", {"generator": "SR", "discriminator": "logit"}[network.name], "", size


def draw_text(x, y, text, size=11, colour="#212529", turned=False, extra=""):
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" dy=".35em" font-size="{size}" fill="{colour}"{turn}{extra}>{text}</text>'


def draw_network(network, top):
    """Draw one row of boxes over the full width. Returns the SVG elements, the x of each box's middle, the boxes."""
    boxes = list(parts(network))
    widths = [18 if kind == "sum" else 24 if kind == "image" else 20 for kind, *_ in boxes]
    gap = (WIDTH - 2 * 16 - sum(widths)) / (len(boxes) - 1)
    middle = top + HEIGHT / 2
    svg, centres, left = [], [], 16
    for (kind, text, label, _), width in zip(boxes, widths):
        x = left + width / 2
        centres.append(x)
        if left > 16:
            svg.append(f'<path d="M{left - gap:.1f} {middle}H{left - 1.5:.1f}" class="arrow"/>')
        if kind == "sum":
            svg.append(f'<circle cx="{x:.1f}" cy="{middle}" r="9" fill="#fff" stroke="#495057" stroke-width="1.3"/>')
            svg.append(
                f'<path d="M{x - 5:.1f} {middle}h10M{x:.1f} {middle - 5}v10" stroke="#495057" stroke-width="1.3"/>'
            )
        else:
            fill, line = COLOURS[kind]
            size = f'width="{width}" height="{HEIGHT}"'
            svg.append(f'<rect x="{left:.1f}" y="{top}" {size} rx="4" fill="{fill}" stroke="{line}"/>')
            svg.append(draw_text(x, middle, text, turned=True))
        if label:
            svg.append(draw_text(x, top - 11, label, 10, "#495057"))
        left += width + gap
    return svg, centres, boxes


def draw_sizes(centres, boxes, y):
    """Draw brackets below neighbouring boxes whose outputs have the same height and width."""
    svg, first = [], 0
    for size, group in itertools.groupby(size for *_, size in boxes):
        last = first + len(list(group)) - 1
        if size:
            a, b = centres[first] - 9, centres[last] + 9
            svg.append(f'<path d="M{a:.1f} {y - 4}V{y}H{b:.1f}V{y - 4}" fill="none" stroke="#adb5bd"/>')
            svg.append(draw_text((a + b) / 2, y + 10, size, 10, "#495057"))
        first = last + 1
    return svg


def architecture(path):
    """Draw Figure 4 of the paper from the networks of model.py."""
    import model

    generator, discriminator = model.generator(), model.discriminator()
    top = 72
    svg, x, boxes = draw_network(generator, top)
    middle, bottom = top + HEIGHT / 2, top + HEIGHT
    first_sum, second_sum = (i for i, (kind, *_) in enumerate(boxes) if kind == "sum")
    edge = x[2] + 19  # between the first PReLU and the residual blocks
    right = (x[first_sum] + x[first_sum + 1]) / 2 - 3
    blocks = sum(re.fullmatch(r"block\d+", layer.name) is not None for layer in generator.layers)
    behind = [
        f'<rect x="{edge:.1f}" y="{top - 42}" width="{right - edge:.1f}" height="{HEIGHT + 62}" rx="6" '
        'fill="#f8f9fa" stroke="#ced4da" stroke-dasharray="4 3"/>',
        draw_text((edge + right) / 2, top - 30, f"{blocks} residual blocks", extra=' font-weight="600"'),
    ]
    # the skip connections: of a block, and of all of them together
    for start, end, y in ((edge + 4, x[first_sum], bottom + 10), (edge - 4, x[second_sum], bottom + 31)):
        svg.append(f'<circle cx="{start:.1f}" cy="{middle}" r="2" fill="#495057"/>')
        svg.append(f'<path d="M{start:.1f} {middle}V{y}H{end:.1f}V{middle + 10.5}" class="arrow"/>')
    svg += draw_sizes(x, boxes, bottom + 47)

    second = bottom + 142
    more, x, boxes = draw_network(discriminator, second)
    svg += more + draw_sizes(x, boxes, second + HEIGHT + 14)
    for y, name in ((20, "Generator"), (second - 44, "Discriminator")):
        svg.append(draw_text(16, y, name, 14, extra=' style="text-anchor:start" font-weight="600"'))
    height = second + HEIGHT + 40
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" text-anchor="middle">\n'
        "<title>The two networks of SRGAN</title>\n"
        "<style>.arrow{fill:none;stroke:#495057;stroke-width:1.2;marker-end:url(#head)}</style>\n"
        '<marker id="head" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="5" markerHeight="5" orient="auto">'
        '<path d="M0 0L6 3L0 6z" fill="#495057"/></marker>\n'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n' + "\n".join(behind + svg) + "\n</svg>\n",
        encoding="utf-8",
    )


# --------------------------------------------------------------------------------------------------------------- curves


def read(logs):
    """Read TensorBoard's points in a folder: `{tag: [(step, value), ...]}`. A value is a float or an encoded image.

    After a run was killed, steps since its last checkpoint come again, and replace those before.
    """
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    if not logs.is_dir():
        return {}
    events = EventAccumulator(str(logs), size_guidance={"tensors": 0})  # 0: all of them
    events.Reload()

    def value(tensor):
        array = tensor_util.make_ndarray(tensor)
        return array[2] if array.shape else float(array)  # of an image: width, height, PNG

    points = {tag: {e.step: value(e.tensor_proto) for e in events.Tensors(tag)} for tag in events.Tags()["tensors"]}
    return {tag: list(steps.items()) for tag, steps in points.items()}


def smooth(values, window):
    """The moving average, over fewer values near both ends."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def curve(path, points, title, label, scale="linear", best=False, guess=False):
    """Draw the points of one scalar as an SVG. The same points give the same file.

    A loss is noisy, since each point is one batch: it is drawn faintly, with its moving average on top.

    Args:
        path: the SVG file to write.
        points: `[(step, value), ...]`
        title, label: the texts above the plot and beside its vertical axis.
        scale: of the vertical axis, "linear" or "log".
        best: draw the values themselves and mark the highest, in dB.
        guess: draw a line at 2 log 2, the loss of a discriminator that guesses.
    """
    import matplotlib
    from matplotlib import ticker
    from matplotlib.figure import Figure

    line, mark, grey = COLOURS["convolution"][1], COLOURS["dense"][1], COLOURS["image"][1]
    steps, values = np.array(points).T
    few = slice(None, None, max(1, len(values) // 1000))  # a million points would be megabytes
    paper = {"color": "white", "alpha": 0.8, "pad": 1}  # behind a text, over the curve
    settings = {"svg.hashsalt": "srgan", "font.size": 9, "axes.titlesize": 10.5, "axes.titleweight": "bold"}
    with matplotlib.rc_context(settings):
        figure = Figure((5, 3.125), layout="constrained")  # inches, 480x300 in a browser
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        axes = figure.subplots()
        axes.set_yscale(scale)
        if scale == "log":
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(ticker.NullLocator())
        if best:
            axes.plot(steps[few], values[few], color=line, linewidth=1.6)
            top = values.argmax()
            axes.plot(steps[top], values[top], "o", color=mark, markersize=5)
            text = f"best: {values[top]:.2f} dB, step {steps[top]:,.0f}"
            axes.text(0.98, 0.05, text, transform=axes.transAxes, ha="right", color=mark, bbox=paper)
        else:
            axes.plot(steps[few], values[few], color=line, linewidth=0.8, alpha=0.35)
            window = min(len(values), max(9, len(values) // 20))
            axes.plot(steps[few], smooth(values, window)[few], color=line, linewidth=1.6)
        if guess:
            axes.axhline(2 * np.log(2), color=grey, linewidth=1, linestyle="--")
            place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
            axes.text(0.99, 2.04 * np.log(2), "2 log 2: guessing", color=grey, bbox=paper, **place)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(6))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_title(title, loc="left")
        axes.set_xlabel("training step")
        axes.set_ylabel(label)
        axes.grid(color="#dee2e6", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None})


# --------------------------------------------------------------------------------------------------------------- images

ZOOM, LABEL, GAP = 2, 28, 8  # each pixel becomes 2x2; the height of a caption; the space between images


def sheet(images, columns):
    """A grid of images with a caption over each: `{caption: uint8 array}`, all of one size."""
    height, width = (ZOOM * side for side in next(iter(images.values())).shape[:2])
    rows = -(-len(images) // columns)
    whole = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (LABEL + height + GAP) - GAP), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(17)
    for i, (caption, image) in enumerate(images.items()):
        left, top = i % columns * (width + GAP), i // columns * (LABEL + height + GAP)
        draw.text((left + width // 2, top + LABEL // 2), caption, "black", font, anchor="mm")
        large = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
        whole.paste(large, (left, top + LABEL))
    return whole


def comparison(path):
    """Draw one detail of the demo image, upscaled with the weights in weights/, beside the original."""
    import data
    import model

    lr = data.read_rgb(ROOT / "input.jpg")
    images = {"bicubic": data.bicubic(lr)}
    generator = model.generator()
    upscale = model.Upscaler(generator)
    for name in NAMES.values():
        model.load_weights(generator, ROOT / "weights" / f"{name.lower()}.weights.h5")
        upscale.load(generator)
        images[name] = upscale(lr)
    images["original"] = data.read_rgb(ROOT / "assets" / "raccoon.jpg")
    sheet({name: image[150:370, 380:620] for name, image in images.items()}, 2).save(path, optimize=True)


def hardest_square(bicubic, hr, side):
    """The square in which bicubic is furthest from the original, as two slices."""
    error = np.square(bicubic - hr.astype(float)).sum(2)
    total = np.pad(error.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # of all above and to the left
    total = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    y, x = np.unravel_index(total.argmax(), total.shape)
    return np.s_[y : y + side, x : x + side]


def frames(name, points, most=30):
    """Bicubic, the network's result after some of the steps, and the original, in one square of the validation crop."""
    import losses

    def decode(png):
        return np.array(Image.open(io.BytesIO(png)).convert("RGB"))

    bicubic, hr = (decode(points[tag][0][1]) for tag in ("crop/bicubic", "crop/HR"))
    part = hardest_square(bicubic, hr, min(144, *hr.shape[:2]))
    bicubic, hr = bicubic[part], hr[part]
    last = len(points["crop/SR"]) - 1
    # closer together at the beginning, where they change fastest
    chosen = range(last + 1) if last < most else sorted({round(last * t**2) for t in np.linspace(0, 1, most)})
    for step, png in (points["crop/SR"][i] for i in chosen):
        sr = decode(png)[part]
        before, after = (f"{losses.psnr(image, hr):.2f} dB" for image in (bicubic, sr))
        yield sheet({f"bicubic: {before}": bicubic, f"{name}, step {step:,}: {after}": sr, "original": hr}, 3)


def video(path, logs):
    """Write the training as an animated WebP, which pauses on each phase's last frame."""
    images, times = [], []
    for phase, points in logs.items():
        images += frames(NAMES[phase], points)
        times += [150] * (len(images) - len(times) - 1) + [2000]  # milliseconds
    images[0].save(path, save_all=True, append_images=images[1:], duration=times, loop=0, quality=85, method=6)


# ----------------------------------------------------------------------------------------------------------------- main

CURVES = {  # file: the phase, TensorBoard's tag, and the arguments of `curve`
    "PSNR.svg": ("pretrain", "PSNR", {"title": "SRResNet: validation PSNR", "label": "PSNR (dB)", "best": True}),
    "MSE_loss.svg": (
        "pretrain", "MSE Loss", {"title": "SRResNet: MSE loss", "label": "MSE, colours from −1 to 1", "scale": "log"},
    ),
    "perceptual_loss.svg": (
        "gan", "Perceptual Loss",
        {"title": "SRGAN: perceptual loss", "label": "weighted sum of its parts"},
    ),
    "discriminator_loss.svg": (
        "gan", "Discriminator Loss",
        {"title": "SRGAN: discriminator loss", "label": "−log D(HR) − log(1 − D(SR)) + penalty", "guess": True},
    ),
}  # fmt: skip


def main(argv=None, folder=ROOT / "assets"):
    """Make the figures of the run that `argv` names in `folder`. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Make the README's figures in assets/ from a training run.")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the --run_dir of a run of main.py")
    logs_dir = parser.parse_args(argv).run_dir / "logs"
    if not logs_dir.is_dir():
        parser.exit(2, f"figures.py: no such folder: {logs_dir}\n")

    start_tensorflow()
    logs = {}
    for phase, name in NAMES.items():
        points = read(logs_dir / phase)
        tags = {"crop/bicubic", "crop/SR", "crop/HR"} | {tag for of, tag, _ in CURVES.values() if of == phase}
        if tags <= points.keys():
            logs[phase] = points
        else:
            print(f"Skipped {name}: {logs_dir / phase} has no {', '.join(sorted(tags - points.keys()))}")

    def make(name, draw, *args, **kwargs):
        draw(folder / name, *args, **kwargs)
        print(folder / name, flush=True)

    if importlib.util.find_spec("matplotlib"):
        for name, (phase, tag, looks) in CURVES.items():
            if phase in logs:
                make(name, curve, logs[phase][tag], **looks)
    else:
        print("Skipped the curves, which need matplotlib: pip install matplotlib")
    if logs:
        make("train_video.webp", video, logs)
    make("architecture.svg", architecture)
    make("comparison.png", comparison)
    return 0


if __name__ == "__main__":
    sys.exit(main())
