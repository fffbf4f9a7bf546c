"""Make assets/comparison.png from the demo picture and the weights in weights/: python3 assets/compare.py"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from PIL import Image, ImageDraw, ImageFont  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402

CROPS = [(150, 20, 310, 180), (300, 330, 460, 490)]  # left, top, right, bottom in the original
ZOOM, LABEL = 2, 28


def main():
    hr = data.read_rgb(ROOT / "assets" / "astronaut.png")
    lr = data.read_rgb(ROOT / "input.jpg")
    columns = {"bicubic": data.bicubic(lr)}
    for label, name in (("SRResNet", "srresnet"), ("SRGAN", "srgan")):
        generator = model.generator()
        model.load_weights(generator, ROOT / "weights" / f"{name}.weights.h5")
        columns[label] = model.make_upscaler(generator)(lr)
    columns["original"] = hr

    side = ZOOM * (CROPS[0][2] - CROPS[0][0])
    sheet = Image.new("RGB", (len(columns) * side, LABEL + len(CROPS) * side), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (label, picture) in enumerate(columns.items()):
        draw.text((i * side + side // 2, LABEL // 2), label, "black", ImageFont.load_default(18), anchor="mm")
        for j, crop in enumerate(CROPS):
            part = Image.fromarray(picture).crop(crop).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(part, (i * side, LABEL + j * side))
    sheet.save(ROOT / "assets" / "comparison.png")


if __name__ == "__main__":
    main()
