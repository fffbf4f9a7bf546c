"""Images in and out of files: every kind into every format, odd files, metadata, and what never happens to a file."""

import contextlib
import io
import os
import resource
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import make_image
from PIL import Image, ImageCms, ImageOps

import data

RGB = make_image(0, 40, 30)
GREY = RGB[..., 1]
RGBA = np.dstack([RGB, np.uint8(np.linspace(0, 255, 40))[None].repeat(30, axis=0)])
LA = np.asarray(Image.fromarray(RGBA).convert("LA"))
BEST = {"quality": 100, "subsampling": "4:4:4"}
RGB_16 = np.random.default_rng(0).integers(0, 2**16, (30, 40, 3), np.uint16)
RGBA_16 = np.dstack([RGB_16, RGB_16[..., 0]])
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ORIENTATION = 0x0112
SAMPLES = Path(__file__).with_name("tiff")  # kinds of TIFF that Pillow doesn't write


def png_16(pixels):
    """A PNG by TensorFlow, which writes 16 bits."""
    import tensorflow as tf

    return tf.io.encode_png(np.atleast_3d(pixels)).numpy()


def insert_chunk(png, kind, content, place=33):
    """A PNG with one more chunk, by default after its header."""
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return png[:place] + struct.pack(">I", len(content)) + kind + content + crc + png[place:]


def saved(pixels, kind, mode=None, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


PALETTE, KEY, BLACK = Image.fromarray(RGB).quantize(50), tuple(map(int, RGB[0, 0])), Image.new("RGB", (40, 30))
PAGE = bytearray(saved(RGB, "TIFF"))
PAGE[130:134] = b"\xff" * 4  # after ten tags, a pointer to a next page that is not there
# name: (the file, its pixels as RGB or grey and perhaps alpha, or None: about RGB, or GREY, or with some alpha)
KINDS = {
    "png": (saved(RGB, "PNG"), RGB),
    "rgba.png": (saved(RGBA, "PNG"), RGBA),
    "grey.png": (saved(GREY, "PNG"), GREY),
    "la.png": (saved(LA, "PNG"), LA),
    "1bit.png": (saved(GREY > 128, "PNG"), np.uint8(GREY > 128) * 255),
    "palette.png": (saved(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB"))),
    "transparent palette.png": (saved(PALETTE, "PNG", transparency=3), None),
    "transparent colour.png": (saved(RGB, "PNG", transparency=KEY), None),
    "16 bit.png": (png_16(RGB_16), RGB_16),
    "16 bit rgba.png": (png_16(RGBA_16), RGBA_16),
    "16 bit grey.png": (png_16(RGB_16[..., 0]), RGB_16[..., 0]),
    "16 bit la.png": (png_16(RGB_16[..., :2]), RGB_16[..., :2]),
    "jpg": (saved(RGB, "JPEG"), None),
    "cmyk.jfif": (saved(RGB, "JPEG", "CMYK", **BEST), None),
    "mpo.jpg": (saved(RGB, "MPO", save_all=True, append_images=[BLACK]), None),
    "webp": (saved(RGB, "WEBP", lossless=True), RGB),
    "profile.webp": (saved(RGB, "WEBP", lossless=True, icc_profile=SRGB), RGB),
    "bmp": (saved(RGB, "BMP"), RGB),
    "tif": (saved(RGB, "TIFF", compression="tiff_lzw", big_tiff=True, dpi=(72, 72)), RGB),
    "cmyk.tif": (saved(RGB, "TIFF", "CMYK"), RGB),
    "16 bit grey.tif": (saved(RGB_16[..., 0], "TIFF"), RGB_16[..., 0]),
    "no next page.tif": (PAGE, RGB),
    "frames.png": (saved(RGB, "PNG", save_all=True, append_images=[BLACK]), RGB),
    "pages.tif": (saved(RGB, "TIFF", save_all=True, append_images=[BLACK.copy()]), RGB),
}
if ".avif" in data.SUFFIXES:
    KINDS["avif"] = saved(RGB, "AVIF", **BEST), None


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "avif"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_into_every_format(tmp_path, kind, suffix):
    if f".{suffix}" not in data.SUFFIXES:
        pytest.skip("this Pillow has no AVIF")
    content, pixels = KINDS[kind]
    source, target = tmp_path / f"in.{kind.rpartition('.')[2]}", tmp_path / f"out.{suffix}"
    source.write_bytes(content)
    deep, transparent = kind.startswith("16 bit"), any(word in kind for word in ("la.", "rgba", "transparent"))
    grey = any(word in kind for word in ("grey", "1bit", "la."))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of this needs a warning
        image, alpha, metadata = data.read_image(source)
        rgb = data.read_rgb(source)
    assert image.shape == (30, 40, 1 if grey else 3) and rgb.shape == (30, 40, 3) and rgb.dtype == np.uint8
    assert image.dtype == (np.uint16 if deep else np.uint8) and (alpha is not None) == transparent
    if pixels is not None:
        whole = image if alpha is None else np.dstack([image, alpha])
        assert np.array_equal(whole.squeeze(), pixels)
    elif not transparent:  # channels in the wrong order are off by more than 90, what JPEG loses is less than 12
        assert np.abs(np.int32(image) - (GREY[..., None] if grey else RGB)).mean(axis=(0, 1)).max() < 15

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        data.write_image(target, image, alpha, metadata)
    stays_deep = deep and (suffix == "png" or (suffix == "tif" and grey and not transparent))
    flattened = transparent and suffix in ("jpg", "bmp")
    assert len(told) == (deep and not stays_deep) + flattened, [str(warning.message) for warning in told]
    made, made_alpha, _ = data.read_image(target)
    assert made.shape == (30, 40, 1 if grey and suffix not in ("webp", "avif") else made.shape[2])
    assert made.dtype == (np.uint16 if stays_deep else np.uint8)
    assert (made_alpha is not None) == (transparent and not flattened)
    if not transparent and (suffix in ("png", "bmp", "tif") or (suffix == "webp" and "webp" in kind)):  # lossless
        assert np.array_equal(made, image if stays_deep or not deep else np.rint(image / 257))
    assert sorted(os.listdir(tmp_path)) == sorted([source.name, target.name])


@pytest.mark.parametrize("name", [path.name for path in SAMPLES.glob("16 bit*.tif")])
def test_16_bit_colour_tiff_in_every_layout(name):
    """Pillow's own reader makes stripes of planes."""
    y, x, c = np.ogrid[:32, :16, :4]
    with pytest.warns(UserWarning, match="16-bit colour, of which 8"):
        image, alpha, _ = data.read_image(SAMPLES / name)
    assert np.array_equal(image, (3 * y + 4 * x + 30 * c)[..., :3])
    assert "rgba" not in name or np.array_equal(alpha, (3 * y + 4 * x + 30 * c)[..., 3])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "16 bit PNG"])
@pytest.mark.filterwarnings("ignore")
def test_orientation(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "a.png"
    if kind == "16 bit PNG":  # where ExifTool writes it, after the pixels
        path.write_bytes(insert_chunk(png_16(RGB_16), b"eXIf", exif.tobytes()[6:], place=-12))
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(saved(np.uint8(RGB_16 >> 8), "PNG", exif=exif))))
    else:
        path.write_bytes(saved(RGB, kind, exif=exif.tobytes()))
        upright = ImageOps.exif_transpose(Image.open(path))
    assert np.abs(np.int32(data.read_rgb(path)) - np.asarray(upright)).max() <= 1
    data.write_image(tmp_path / "b.jpg", *data.read_image(path))
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.size == upright.size and image.getexif().get(ORIENTATION, 1) == 1


@pytest.mark.parametrize("source", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("target", ["jpg", "png", "webp", "tif", "avif"])
def test_metadata_is_kept_except_what_no_longer_holds(tmp_path, source, target):
    if not {f".{source}", f".{target}"} <= {*data.SUFFIXES}:
        pytest.skip("this Pillow has no AVIF")
    exif = Image.Exif()
    exif[271], exif[306], exif[ORIENTATION] = "Maker", "2020:01:02 03:04:05", 6
    exif.get_ifd(0x8769).update({0xA002: 40, 0xA003: 30, 0x829D: 2.8, 0xA005: {1: "R98"}})
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    Image.fromarray(RGB).save(tmp_path / f"a.{source}", exif=exif.tobytes(), icc_profile=SRGB, dpi=(300, 300))
    data.write_image(tmp_path / f"b.{target}", *data.read_image(tmp_path / f"a.{source}"))
    with Image.open(tmp_path / f"b.{target}") as image:
        assert image.size == (30, 40) and image.info["icc_profile"] == SRGB
        if {source, target}.isdisjoint({"webp", "avif"}):  # which have no resolution of their own
            assert [round(number) for number in image.info["dpi"]] == [300, 300]
        exif = image.getexif()
        assert (exif[271], exif[306], exif.get(ORIENTATION, 1)) == ("Maker", "2020:01:02 03:04:05", 1)
        details = exif.get_ifd(0x8769)
        assert float(details[0x829D]) == 2.8 and not {0xA002, 0xA003, 0xA005} & {*details}
        assert exif.get_ifd(0x8825)[1] == "N"


@pytest.mark.filterwarnings("ignore")
def test_metadata_that_is_damaged_too_long_or_of_another_colour_is_left_out(tmp_path):
    too_much, path = Image.Exif(), tmp_path / "a.jpg"
    too_much[270] = "x" * 70_000
    for exif in (too_much, b"Exif\0\0MM\0*\0\0\0\x08\xff\xffnonsense"):
        path.write_bytes(saved(RGB, "PNG", exif=exif))
        data.write_image(tmp_path / "b.jpg", *data.read_image(path))
        assert data.read_rgb(tmp_path / "b.jpg").shape == (30, 40, 3)
    path.write_bytes(saved(GREY, "JPEG", icc_profile=SRGB))
    assert "icc_profile" not in data.read_image(path)[2]
    for profile in (SRGB, b"damaged"):
        path.write_bytes(saved(RGB, "JPEG", "CMYK", **BEST, icc_profile=profile))
        assert np.abs(np.int32(data.read_rgb(path)) - RGB).mean() < 15


@pytest.mark.parametrize("chunk", [b"zTXt", b"iCCP"])
def test_png_with_megabytes_of_text_or_profile(tmp_path, chunk):
    content = b"name\0\0" + zlib.compress(bytes(5 << 20))
    (tmp_path / "a.png").write_bytes(insert_chunk(saved(RGB, "PNG"), chunk, content))
    assert np.array_equal(data.read_rgb(tmp_path / "a.png"), RGB)


def test_colours_under_transparency_do_not_bleed(tmp_path):
    """A red disc on transparent black stays red at its edge, through an interpolation, and on white."""
    y, x = np.mgrid[:45, :51]
    alpha = np.uint8(255 * ((y - 20) ** 2 + (x - 30) ** 2 < 200))
    pixels = np.uint8([200, 30, 30]) * (alpha > 0)[..., None]
    spread = data.spread_colours(pixels, alpha)
    assert np.array_equal(spread, np.broadcast_to(np.uint8([200, 30, 30]), pixels.shape))
    with pytest.warns(UserWarning, match="white"):
        data.write_image(tmp_path / "a.bmp", data.bicubic(spread), data.bicubic(alpha))
    made = data.read_rgb(tmp_path / "a.bmp")
    assert made[0, 0].tolist() == [255, 255, 255] and made[..., 0].min() >= 199


JPEG_12 = bytearray(saved(RGB, "JPEG"))  # a header of 12 bits
JPEG_12[JPEG_12.index(b"\xff\xc0") + 4] = 12
REFUSED = {  # name: (the file, what its error says it is)
    "12 bits.jpg": (JPEG_12, "12-bit"),
    "float.tif": ((SAMPLES / "float.tif").read_bytes(), "rare kind"),
    "grey float.tif": ((SAMPLES / "grey float.tif").read_bytes(), "rare kind"),
    "grey 12 bit.tif": ((SAMPLES / "grey 12 bit.tif").read_bytes(), "rare kind"),
    "grey white is zero.tif": ((SAMPLES / "grey white is zero.tif").read_bytes(), "rare kind"),
    "postscript.png": (saved(RGB, "EPS"), "not a PNG"),  # Pillow would start Ghostscript
    "long.png": (insert_chunk(saved(RGB, "PNG"), b"zTXt", b"a\0\0" + zlib.compress(bytes(65 << 20))), "over 64 MB"),
    "text.jpg": (b"not an image", "not a JPEG"),
    "missing.png": (None, "No such file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_one_line_that_says_what_it_is(tmp_path, name):
    content, words = REFUSED[name]
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OSError, match=f"can't read .*{name}.*{words}") as error:
        data.read_image(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_truncated_and_damaged_images_are_read_or_refused_in_one_line(tmp_path, kind):
    path, rng = tmp_path / f"a.{kind.rpartition('.')[2]}", np.random.default_rng(0)
    whole = KINDS[kind][0]
    for length in (0, 20, 0 if kind == "pages.tif" else len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(OSError, match=f"can't read {path}: [^\n]+$"):
            data.read_rgb(path)
    for _ in range(10):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(0, len(damaged), 5)] = rng.integers(0, 256, 5)
        path.write_bytes(damaged)
        with contextlib.suppress(OSError):
            assert data.read_rgb(path).shape[2] == 3


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, suffix, deep):
    """Files may not grow beyond 1 kB: as on a full disk, writing breaks off in the middle."""
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"old")
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(OSError, match=f"can't write {path}: "):
            data.write_image(path, np.uint16(pixels) * 257 if deep else pixels)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", data.SUFFIXES)
def test_sizes_that_a_format_cannot_hold_are_refused_before_the_work(tmp_path, suffix):
    path, longest = tmp_path / f"a{suffix}", data.LONGEST_SIDE.get(data.SUFFIXES[suffix], 0)
    if longest:
        data.check_output(path, longest // 4, 1)
        data.write_image(path, np.zeros((1, longest, 1), np.uint8))
        assert data.read_rgb(path).shape == (1, longest, 3)
    width, height = (longest // 4 + 1, 1) if longest else (8200, 8200)  # 32800 * 32800 * 4 bytes are over 4 GiB
    with pytest.raises(data.UserError, match=f"a{suffix}: .*x") if suffix != ".png" else contextlib.nullcontext():
        data.check_output(path, width, height)
