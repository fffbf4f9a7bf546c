"""Images in and out of files: every kind into every format, odd files, metadata, and what never happens to a file."""

import contextlib
import io
import os
import resource
import struct
import threading
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
RAMP = np.linspace(0, 255, 40).astype(np.uint8)
RGBA = np.dstack([RGB, np.tile(RAMP, (30, 1))])
LA = np.asarray(Image.fromarray(RGBA).convert("LA"))
BEST = {"quality": 100, "subsampling": "4:4:4"}
RNG = np.random.default_rng(0)
RGB_16 = RNG.integers(0, 2**16, (30, 40, 3), np.uint16)
RGBA_16 = np.dstack([RGB_16, RGB_16[..., 0]])
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY_PROFILE = SRGB[:16] + b"GRAY" + SRGB[20:]
ORIENTATION = 0x0112
SAMPLES = Path(__file__).with_name("tiff")  # kinds of TIFF that Pillow doesn't write


# ---- Files, made by hand ----


def png_chunk(kind, content):
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def insert_chunk(png, kind, content, place=33):
    """A PNG with one more chunk, by default after its header."""
    return png[:place] + png_chunk(kind, content) + png[place:]


def png(colour_type, depth, samples, *chunks):
    """A PNG of `(h, w, channels)` samples of `depth` bits."""
    height, width, channels = samples.shape
    bits = samples[..., None] >> np.arange(depth - 1, -1, -1) & 1
    rows = np.packbits(bits.reshape(height, -1), axis=1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    for kind, inner in chunks:
        content += png_chunk(kind, inner)
    return content + png_chunk(b"IDAT", zlib.compress(lines)) + png_chunk(b"IEND", b"")


def png_16(pixels):
    """A PNG by TensorFlow, which writes 16 bits."""
    import tensorflow as tf

    return tf.io.encode_png(np.atleast_3d(pixels)).numpy()


def tiff(tags):
    """A TIFF of the pixels of RGB, with these tags besides: {number: (type, count, content)}."""
    height, width, _ = RGB.shape
    shorts = {256: width, 257: height, 259: 1, 262: 2, 277: 3, 278: height}
    entries = {number: (3, 1, struct.pack("<H", value)) for number, value in shorts.items()}
    entries[258] = (3, 3, struct.pack("<3H", 8, 8, 8))
    entries[273] = (4, 1, struct.pack("<I", 8))
    entries[279] = (4, 1, struct.pack("<I", RGB.nbytes))
    entries |= tags
    start = 8 + RGB.nbytes
    place = start + 2 + 12 * len(entries) + 4  # of the next content that an entry doesn't hold
    directory = struct.pack("<H", len(entries))
    contents = b""
    for number, (kind, count, content) in sorted(entries.items()):
        directory += struct.pack("<HHI", number, kind, count)
        if len(content) <= 4:
            directory += content.ljust(4, b"\0")
        else:
            directory += struct.pack("<I", place + len(contents))
            contents += content
    return struct.pack("<2sHI", b"II", 42, start) + RGB.tobytes() + directory + bytes(4) + contents


def saved(pixels, kind, mode=None, **options):
    """The file that Pillow writes of pixels or its image."""
    image = pixels
    if not isinstance(pixels, Image.Image):
        image = Image.fromarray(pixels)
    if mode:
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(path, content):
    """Write a file and read it as an image."""
    path.write_bytes(content)
    return data.read_image(path)


def only_if_avif(*suffixes):
    if "avif" in suffixes and ".avif" not in data.SUFFIXES:
        pytest.skip("this Pillow has no AVIF")


# ---- Every kind into every format ----

PALETTE = Image.fromarray(RGB).quantize(50)
KEY = tuple(map(int, RGB[0, 0]))
BLACK = Image.new("RGB", (40, 30))
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
}
if ".avif" in data.SUFFIXES:
    KINDS["avif"] = saved(RGB, "AVIF", **BEST), None


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "avif"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_into_every_format(tmp_path, kind, suffix):
    only_if_avif(suffix)
    content, pixels = KINDS[kind]
    source = tmp_path / f"in.{kind.rpartition('.')[2]}"
    target = tmp_path / f"out.{suffix}"
    deep = kind.startswith("16 bit")
    transparent = any(word in kind for word in ("la.", "rgba", "transparent"))
    grey = any(word in kind for word in ("grey", "1bit", "la."))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of this needs a warning
        image, alpha, metadata = read(source, content)
        rgb = data.read_rgb(source)
    assert rgb.shape == (30, 40, 3)
    assert rgb.dtype == np.uint8
    assert image.shape == (30, 40, 1 if grey else 3)
    assert image.dtype == (np.uint16 if deep else np.uint8)
    assert (alpha is not None) == transparent
    if pixels is not None:
        whole = image if alpha is None else np.dstack([image, alpha])
        np.testing.assert_array_equal(whole.squeeze(), pixels)
    elif not transparent:  # channels in the wrong order are off by more than 90, what JPEG loses is less than 12
        expected = GREY[..., None] if grey else RGB
        assert np.abs(np.int32(image) - expected).mean(axis=(0, 1)).max() < 15

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        data.write_image(target, image, alpha, metadata)
    stays_deep = deep and (suffix == "png" or (suffix == "tif" and grey and not transparent))
    flattened = transparent and suffix in ("jpg", "bmp")
    loses_depth = deep and not stays_deep
    assert len(told) == loses_depth + flattened
    made, made_alpha, _ = data.read_image(target)
    assert made.shape[:2] == (30, 40)
    assert made.dtype == (np.uint16 if stays_deep else np.uint8)
    assert (made_alpha is not None) == (transparent and not flattened)
    if grey and suffix not in ("webp", "avif"):
        assert made.shape[2] == 1
    lossless = suffix in ("png", "bmp", "tif") or (suffix == "webp" and "webp" in kind)
    if lossless and not transparent:
        expected = np.rint(image / 257) if loses_depth else image
        np.testing.assert_array_equal(made, expected)
    assert sorted(os.listdir(tmp_path)) == [source.name, target.name]


@pytest.mark.parametrize("name", [path.name for path in SAMPLES.glob("16 bit*.tif")])
def test_16_bit_colour_tiff_in_every_layout(name):
    """Pillow's own reader makes stripes of planes."""
    y, x, c = np.ogrid[:32, :16, :4]
    pixels = 3 * y + 4 * x + 30 * c
    with pytest.warns(UserWarning, match="has 16-bit colour, of which 8 are read"):
        image, alpha, _ = data.read_image(SAMPLES / name)
    np.testing.assert_array_equal(image, pixels[..., :3])
    if "rgba" in name:
        np.testing.assert_array_equal(alpha, pixels[..., 3])


GREY_TYPE, COLOUR_TYPE, PALETTE_TYPE = 0, 2, 3


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("colour_type", [GREY_TYPE, COLOUR_TYPE, PALETTE_TYPE])
def test_transparency_of_png_in_every_depth(tmp_path, colour_type, depth):
    if depth not in {COLOUR_TYPE: (8, 16), PALETTE_TYPE: (1, 2, 4, 8)}.get(colour_type, (depth,)):
        pytest.skip("not a kind of PNG")
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 2**depth, (9, 11, 3 if colour_type == COLOUR_TYPE else 1))
    samples[:2] = samples[0, 0]
    samples[1, 5:] ^= 1  # differs in the lowest bit alone
    full = 2**16 - 1 if depth == 16 else 255
    if colour_type == PALETTE_TYPE:
        palette = rng.integers(0, 256, (2**depth, 4), np.uint8)
        chunks = [(b"PLTE", palette[:, :3].tobytes()), (b"tRNS", palette[:, 3].tobytes())]
        pixels, alpha = np.split(palette[samples[..., 0]], [3], axis=2)
    else:
        chunks = [(b"tRNS", samples[0, 0].astype(">u2").tobytes())]
        pixels = samples * (full // (2**depth - 1))
        alpha = np.where((samples == samples[0, 0]).all(axis=2), 0, full)
    image, image_alpha, _ = read(tmp_path / "a.png", png(colour_type, depth, samples, *chunks))
    np.testing.assert_array_equal(image, pixels)
    np.testing.assert_array_equal(image_alpha, alpha.squeeze())


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_of_several_frames_or_pages_the_first_is_read_and_told(tmp_path, kind):
    only_if_avif(kind.lower())
    path = tmp_path / f"a.{kind.lower()}"
    more = [BLACK.copy(), Image.fromarray(RGB[::-1].copy())]
    content = saved(RGB, kind, save_all=True, append_images=more)
    with pytest.warns(UserWarning, match=f"^{path} has 3 frames or pages: only the first is read$"):
        image, _, _ = read(path, content)
    assert np.abs(np.int32(image) - RGB).mean() < 15


# ---- Colours and metadata ----

CICP_HDR = bytes([9, 16, 0, 1])
CICP_SRGB = bytes([1, 13, 0, 1])
GAMMA_LINEAR = struct.pack(">I", 100_000)
GAMMA_SRGB = struct.pack(">I", 45_455)
P3 = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
# The chunks of a PNG, and whether its pixels look different from sRGB's.
COLOURS = [
    ({b"gAMA": GAMMA_LINEAR}, True),
    ({b"gAMA": GAMMA_SRGB}, False),
    ({b"gAMA": GAMMA_LINEAR, b"sRGB": b"\0"}, False),
    ({b"cHRM": P3}, True),
    ({b"cICP": CICP_HDR}, True),
    ({b"cICP": CICP_HDR, b"sRGB": b"\0"}, True),
    ({b"cICP": CICP_HDR, b"iCCP": b"name\0\0" + zlib.compress(SRGB)}, False),  # the profile is kept
    ({b"cICP": CICP_SRGB, b"gAMA": GAMMA_LINEAR}, False),
    ({b"cICP": b"\1"}, False),  # damaged
]


@pytest.mark.parametrize("chunks, different", COLOURS)
def test_colours_that_are_not_srgb_are_told(tmp_path, chunks, different):
    content = saved(RGB, "PNG")
    for kind, inner in chunks.items():
        content = insert_chunk(content, kind, inner)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        image, _, _ = read(tmp_path / "a.png", content)
    lines = [str(warning.message) for warning in told]
    assert len(lines) == different
    for line in lines:
        assert line.startswith(f"{tmp_path}/a.png has colours other than sRGB")
    np.testing.assert_array_equal(image, RGB)


def test_colours_of_hdr_in_avif_are_told(tmp_path):
    only_if_avif("avif")
    content = saved(RGB, "AVIF")
    place = content.index(b"nclx") + 4
    content = content[:place] + struct.pack(">HH", 9, 16) + content[place + 4 :]
    with pytest.warns(UserWarning, match=f"^{tmp_path}/a.avif has colours other than sRGB"):
        read(tmp_path / "a.avif", content)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "16 bit PNG"])
@pytest.mark.filterwarnings("ignore")
def test_orientation(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "a.png"
    if kind == "16 bit PNG":  # where ExifTool writes it, after the pixels
        content = insert_chunk(png_16(RGB_16), b"eXIf", exif.tobytes()[6:], place=-12)
        known = saved(np.uint8(RGB_16 >> 8), "PNG", exif=exif)
    else:
        content = saved(RGB, kind, exif=exif.tobytes())
        known = content
    path.write_bytes(content)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(known)))
    difference = np.int32(data.read_rgb(path)) - np.asarray(upright)
    assert np.abs(difference).max() <= 1
    data.write_image(tmp_path / "b.jpg", *data.read_image(path))
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.size == upright.size
        assert image.getexif().get(ORIENTATION, 1) == 1


@pytest.mark.parametrize("source", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("target", ["jpg", "png", "webp", "tif", "avif"])
def test_metadata_is_kept_except_what_no_longer_holds(tmp_path, source, target):
    only_if_avif(source, target)
    exif = Image.Exif()
    exif[271] = "Maker"
    exif[306] = "2020:01:02 03:04:05"
    exif[ORIENTATION] = 6
    exif.get_ifd(0x8769).update({0xA002: 40, 0xA003: 30, 0x829D: 2.8, 0xA005: {1: "R98"}})
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    Image.fromarray(RGB).save(tmp_path / f"a.{source}", exif=exif.tobytes(), icc_profile=SRGB, dpi=(300, 300))
    data.write_image(tmp_path / f"b.{target}", *data.read_image(tmp_path / f"a.{source}"))
    with Image.open(tmp_path / f"b.{target}") as image:
        assert image.size == (30, 40)
        assert image.info["icc_profile"] == SRGB
        if {source, target}.isdisjoint({"webp", "avif"}):  # which have no resolution of their own
            assert [round(number) for number in image.info["dpi"]] == [300, 300]
        exif = image.getexif()
        assert exif[271] == "Maker"
        assert exif[306] == "2020:01:02 03:04:05"
        assert exif.get(ORIENTATION, 1) == 1
        assert exif.get_ifd(0x8825)[1] == "N"
        details = exif.get_ifd(0x8769)
        assert float(details[0x829D]) == 2.8
        assert not {0xA002, 0xA003, 0xA005} & {*details}


def damaged_exif():
    """EXIF that says of the resolution that it is an empty text, and has a unit."""
    header = b"Exif\0\0MM\0*\0\0\0\x08"
    entries = struct.pack(">HHHII", 2, 282, 2, 1, 0)
    entries += struct.pack(">HHIHH", 296, 3, 1, 2, 0)
    return header + entries + bytes(4)


def long_exif():
    exif = Image.Exif()
    exif[270] = "x" * 70_000
    return exif.tobytes()


TEXT = (2, 3, b"72\0")
RATIONAL = (5, 1, struct.pack("<II", 72, 1))
SHORTS = (3, 2, struct.pack("<HH", 1, 2))
PHOTOSHOP = b"\xff\xd8\xff\xed\0\x16Photoshop 3.0\x008BIM\4\4"  # the start of a JPEG
DAMAGED = {
    "resolution is empty.jpg": saved(RGB, "JPEG", exif=damaged_exif(), **BEST),
    "photoshop's is cut off.jpg": PHOTOSHOP + saved(RGB, "JPEG", **BEST)[2:],
    "exif is nonsense.png": saved(RGB, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xffnonsense"),
    "exif is long.png": saved(RGB, "PNG", exif=long_exif()),
    "text is long.png": insert_chunk(saved(RGB, "PNG"), b"zTXt", b"a\0\0" + zlib.compress(bytes(65 << 20))),
    "checksum is wrong.png": saved(RGB, "PNG", dpi=(72, 72)).replace(b"pHYs\0", b"pHYs\1"),
    "profile is damaged.jpg": saved(RGB, "JPEG", icc_profile=b"damaged", **BEST),
    "profile is numbers.tif": tiff({34675: SHORTS}),
    "profile is of grey.jpg": saved(RGB, "JPEG", icc_profile=GREY_PROFILE, **BEST),
    "resolution is text.tif": tiff({282: RATIONAL, 283: (2, 4, b"one\0")}),
    "resolution is text with a unit.tif": tiff({282: TEXT, 283: TEXT, 296: (3, 1, b"\3\0")}),
    "resolution is empty.tif": tiff({282: (2, 0, b""), 283: RATIONAL, 296: (3, 1, b"\2\0")}),
    "xmp is numbers.tif": tiff({700: SHORTS}),
    "exif is far away.tif": tiff({34665: (4, 1, b"\xff\xff\xff\0")}),
}
if ".avif" in data.SUFFIXES:
    DAMAGED["exif is nonsense.avif"] = saved(RGB, "AVIF", exif=long_exif(), **BEST).replace(b"MM\0*", b"none")


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.filterwarnings("ignore")
def test_damaged_metadata_is_left_out_and_the_pixels_are_used(tmp_path, name):
    image, _, metadata = read(tmp_path / name, DAMAGED[name])
    assert np.abs(np.int32(image) - RGB).mean() < 3
    assert not {"icc_profile", "dpi"} & {*metadata}
    for suffix in data.SUFFIXES:
        data.write_image(tmp_path / f"b{suffix}", image, None, metadata)
        assert data.read_rgb(tmp_path / f"b{suffix}").shape == (30, 40, 3)


@pytest.mark.parametrize("suffix", data.SUFFIXES)
def test_a_profile_of_grey_is_kept_where_grey_stays_grey(tmp_path, suffix):
    path = tmp_path / f"b{suffix}"
    image, _, metadata = read(tmp_path / "a.png", saved(GREY, "PNG", icc_profile=GREY_PROFILE))
    assert metadata["icc_profile"] == GREY_PROFILE
    data.write_image(path, image, None, metadata)
    with Image.open(path) as made:
        expected = None if suffix in (".webp", ".avif", ".bmp") else GREY_PROFILE  # without, or RGB
        assert made.info.get("icc_profile") == expected


@pytest.mark.parametrize("profile", [SRGB, b"damaged"])
def test_cmyk_with_a_profile_that_is_not_of_cmyk(tmp_path, profile):
    image, _, metadata = read(tmp_path / "a.jpg", saved(RGB, "JPEG", "CMYK", **BEST, icc_profile=profile))
    assert np.abs(np.int32(image) - RGB).mean() < 15


@pytest.mark.parametrize("chunk", [b"zTXt", b"iCCP"])
def test_png_with_megabytes_of_text_or_profile(tmp_path, chunk):
    content = b"name\0\0" + zlib.compress(bytes(5 << 20))
    image, _, _ = read(tmp_path / "a.png", insert_chunk(saved(RGB, "PNG"), chunk, content))
    np.testing.assert_array_equal(image, RGB)


def test_colours_under_transparency_do_not_bleed(tmp_path):
    """A red disc on transparent black stays red at its edge, through an interpolation, and on white."""
    y, x = np.mgrid[:45, :51]
    disc = (y - 20) ** 2 + (x - 30) ** 2 < 200
    alpha = np.uint8(255 * disc)
    red = np.uint8([200, 30, 30])
    pixels = red * disc[..., None]
    spread = data.spread_colours(pixels, alpha)
    np.testing.assert_array_equal(spread, np.broadcast_to(red, pixels.shape))
    path = tmp_path / "a.bmp"
    with pytest.warns(UserWarning, match=f"^{path} can't hold transparency: the image is put on white$"):
        data.write_image(path, data.bicubic(spread), data.bicubic(alpha))
    made = data.read_rgb(path)
    assert made[0, 0].tolist() == [255, 255, 255]
    assert made[..., 0].min() >= 199


# ---- What can't be read or written ----

JPEG_12 = bytearray(saved(RGB, "JPEG"))  # a header of 12 bits
JPEG_12[JPEG_12.index(b"\xff\xc0") + 4] = 12
REFUSED = {  # name: (the file, what its error says it is)
    "12 bits.jpg": (JPEG_12, "cannot handle 12-bit layers"),
    "float.tif": ((SAMPLES / "float.tif").read_bytes(), "its pixels are of a rare kind"),
    "grey float.tif": ((SAMPLES / "grey float.tif").read_bytes(), "its pixels are of a rare kind"),
    "grey 12 bit.tif": ((SAMPLES / "grey 12 bit.tif").read_bytes(), "its pixels are of a rare kind"),
    "grey white is zero.tif": ((SAMPLES / "grey white is zero.tif").read_bytes(), "its pixels are of a rare kind"),
    "postscript.png": (saved(RGB, "EPS"), "not a PNG file"),  # Pillow would start Ghostscript
    "text.jpg": (b"not an image", "not a JPEG file"),
    "text.data": (b"not an image", "not one of "),
    "cut.png": (saved(RGB, "PNG")[:999], "image file is truncated"),
    "cut.tif": (saved(RGB, "TIFF")[:999], ""),
    "missing.png": (None, "No such file"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_read_is_one_line_that_says_what_it_is(tmp_path, name):
    content, why = REFUSED[name]
    path = tmp_path / name
    if content:
        path.write_bytes(content)
    with pytest.raises(OSError, match=f"^can't read {path}: {why}[^\n]*$"):
        data.read_image(path)


def test_a_refusal_inside_open_image_is_not_taken_for_a_fault_of_the_image(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(RGB, "PNG"))
    with pytest.raises(data.UserError, match="^can't write b.xyz: the name of an image ends in one of "):
        with data.open_image(tmp_path / "a.png") as (_, image):
            data.check_output("b.xyz", *image.size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_truncated_and_damaged_images_are_read_or_refused_in_one_line(tmp_path, kind):
    path = tmp_path / f"a.{kind.rpartition('.')[2]}"
    rng = np.random.default_rng(0)
    whole, _ = KINDS[kind]
    for length in (0, 20, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(OSError, match=f"^can't read {path}: [^\n]+$"):
            data.read_rgb(path)
    for _ in range(10):
        damaged = np.frombuffer(whole, np.uint8).copy()
        places = rng.integers(0, len(damaged), 5)
        damaged[places] = rng.integers(0, 256, 5)
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
        with pytest.raises(OSError, match=f"^can't write {path}: "):
            data.write_image(path, np.uint16(pixels) * 257 if deep else pixels)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


def test_any_failure_to_write_is_one_line(tmp_path):
    path = tmp_path / "a.jpg"
    with pytest.raises(OSError, match=f"^can't write {path}: [^\n]+$"):
        data.write_image(path, RGB, None, {"dpi": "text"})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", data.SUFFIXES)
def test_sizes_that_a_format_cannot_hold_are_refused_before_the_work(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    longest = data.LONGEST_SIDE.get(data.SUFFIXES[suffix])
    if longest:
        data.check_output(path, longest // 4, 1)
        data.write_image(path, np.zeros((1, longest, 1), np.uint8))
        assert data.read_rgb(path).shape == (1, longest, 3)
    size = (longest // 4 + 1, 1) if longest else (8200, 8200)  # 32800 * 32800 * 4 bytes are over 4 GiB
    if suffix == ".png":
        data.check_output(path, *size)
        return
    with pytest.raises(data.UserError, match=f"^can't write {path}: {4 * size[0]}x{4 * size[1]} is more than "):
        data.check_output(path, *size)


@pytest.mark.filterwarnings("ignore")
def test_threads_may_read_and_write_at_once(tmp_path):
    """While one reads, another writes: what comes of it is what comes of it one after the other."""
    failures = []

    def work(thread):
        for round in range(3):
            for kind in KINDS:
                suffix = kind.rpartition(".")[2]
                try:
                    source = tmp_path / f"{thread} {round} {kind.replace('.', ' ')}.{suffix}"
                    image, alpha, metadata = read(source, KINDS[kind][0])
                    data.write_image(source, image, alpha, metadata)
                    written = source.read_bytes()
                    expected.setdefault(kind, written)
                    if written != expected[kind]:
                        failures.append(kind)
                except Exception as error:
                    failures.append(f"{kind}: {error}")

    expected = {}
    work("first")
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
