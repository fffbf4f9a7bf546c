"""Images in and out of files: every format and kind, and what must never happen to a file."""

import errno
import io
import os
import resource
import stat
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import make_image
from PIL import Image, ImageCms, ImageOps

import data
import main


def nearest(lr, progress=None):
    """Stands for the network."""
    return lr.repeat(4, axis=0).repeat(4, axis=1)


RGB = make_image(0, 40, 30)
GREY = RGB[..., 1]
ALPHA = np.uint8(np.linspace(0, 255, 40))[None].repeat(30, axis=0)
RGBA = np.dstack([RGB, ALPHA])
RGB_16 = np.random.default_rng(0).integers(0, 2**16, (30, 40, 3), np.uint16)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def png_16(*channels):
    """A PNG by TensorFlow, which writes 16 bits."""
    import tensorflow as tf

    return tf.io.encode_png(np.dstack(channels)).numpy()


def insert_chunk(png, kind, content, place=33):
    """A PNG with one more chunk, by default after its header."""
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return png[:place] + struct.pack(">I", len(content)) + kind + content + crc + png[place:]


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def palette(transparent):
    image = Image.fromarray(RGB).quantize(50)
    return saved(image, "PNG", **({"transparency": 3} if transparent else {}))


KINDS = {  # name: (the file, its pixels as RGB or grey and perhaps alpha, or None: whatever Pillow makes of it)
    "png": (lambda: saved(Image.fromarray(RGB), "PNG"), RGB),
    "grey.png": (lambda: saved(Image.fromarray(GREY), "PNG"), GREY),
    "1bit.png": (lambda: saved(Image.fromarray(GREY > 128), "PNG"), np.uint8(GREY > 128) * 255),
    "rgba.png": (lambda: saved(Image.fromarray(RGBA), "PNG"), RGBA),
    "la.png": (
        lambda: saved(Image.fromarray(RGBA).convert("LA"), "PNG"),
        np.asarray(Image.fromarray(RGBA).convert("LA")),
    ),
    "palette.png": (lambda: palette(False), np.asarray(Image.fromarray(RGB).quantize(50).convert("RGB"))),
    "transparent palette.png": (lambda: palette(True), None),
    "neutral palette.png": (lambda: saved(Image.fromarray(GREY).convert("P"), "PNG"), np.dstack([GREY] * 3)),
    "transparent colour.png": (
        lambda: saved(Image.fromarray(RGB), "PNG", transparency=tuple(map(int, RGB[0, 0]))),
        None,
    ),
    "16 bit.png": (lambda: png_16(RGB_16), RGB_16),
    "16 bit rgba.png": (lambda: png_16(RGB_16, RGB_16[..., 0]), np.dstack([RGB_16, RGB_16[..., 0]])),
    "16 bit grey.png": (lambda: png_16(RGB_16[..., 0]), RGB_16[..., 0]),
    "16 bit la.png": (lambda: png_16(RGB_16[..., :2]), RGB_16[..., :2]),
    "jpg": (lambda: saved(Image.fromarray(RGB), "JPEG"), None),
    "grey.jpg": (lambda: saved(Image.fromarray(GREY), "JPEG"), None),
    "cmyk.jpg": (lambda: saved(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=100, subsampling=0), None),
    "webp": (lambda: saved(Image.fromarray(RGB), "WEBP", lossless=True), RGB),
    "rgba.webp": (lambda: saved(Image.fromarray(RGBA), "WEBP", lossless=True, exact=True), RGBA),
    "bmp": (lambda: saved(Image.fromarray(RGB), "BMP"), RGB),
    "grey.bmp": (lambda: saved(Image.fromarray(GREY), "BMP"), GREY),
    "tif": (lambda: saved(Image.fromarray(RGB), "TIFF", compression="tiff_lzw"), RGB),
    "rgba.tif": (lambda: saved(Image.fromarray(RGBA), "TIFF"), RGBA),
    "cmyk.tif": (lambda: saved(Image.fromarray(RGB).convert("CMYK"), "TIFF"), RGB),
    "lab.tif": (
        lambda: saved(
            ImageCms.profileToProfile(
                Image.fromarray(RGB), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
            ),
            "TIFF",
        ),
        None,
    ),
    "16 bit grey.tif": (lambda: saved(Image.fromarray(RGB_16[..., 0]), "TIFF"), RGB_16[..., 0]),
    "gif": (lambda: saved(Image.fromarray(GREY), "GIF"), np.dstack([GREY] * 3)),
}
GREY_KINDS = {"1bit.png", "la.png", "grey.png", "grey.jpg", "grey.bmp", "16 bit grey.png", "16 bit la.png"}
GREY_KINDS |= {"16 bit grey.tif"}
ALPHA_KINDS = {kind for kind in KINDS if "la." in kind or "rgba" in kind or "transparent" in kind}


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_into_every_format(tmp_path, kind, suffix):
    make, pixels = KINDS[kind]
    source, target = tmp_path / f"in.{kind.rpartition('.')[2]}", tmp_path / f"out.{suffix}"
    source.write_bytes(make())
    grey, deep, transparent = kind in GREY_KINDS, kind.startswith("16 bit"), kind in ALPHA_KINDS

    image = data.read_image(source)
    assert image.pixels.shape == (30, 40, 1 if grey else 3)
    assert image.pixels.dtype == (np.uint16 if deep else np.uint8)
    assert (image.alpha is not None) == transparent
    if pixels is not None:
        whole = image.pixels if image.alpha is None else np.dstack([image.pixels, image.alpha])
        assert np.array_equal(whole.squeeze(), pixels)
    elif not transparent:  # channels in the wrong order are off by more than 90, what JPEG loses is less than 12
        assert np.abs(np.int32(image.pixels) - (GREY[..., None] if grey else RGB)).mean(axis=(0, 1)).max() < 15

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        main.upscale_image(nearest, source, target)
    told = " ".join(str(warning.message) for warning in told)
    stays_deep = deep and (suffix == "png" or (suffix == "tif" and grey and not transparent))
    assert ("16 bits" in told) == (deep and not stays_deep)
    assert ("on white" in told) == (transparent and suffix in ("jpg", "bmp"))

    made = data.read_image(target)
    assert made.pixels.shape == (120, 160, 1 if grey and suffix != "webp" else 3)
    assert made.pixels.dtype == (np.uint16 if stays_deep else np.uint8)
    assert (made.alpha is not None) == (transparent and suffix not in ("jpg", "bmp"))
    if not (transparent or suffix in ("jpg", "webp")):  # lossless
        expected = nearest(image.pixels)
        assert np.array_equal(made.pixels, expected if stays_deep or not deep else data.to_8_bit(expected))
    if made.alpha is not None:
        expected = data.bicubic(image.alpha)
        assert np.array_equal(made.alpha, expected if stays_deep or not deep else data.to_8_bit(expected))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, target.name])


@pytest.mark.parametrize("kind", KINDS)
def test_read_rgb_takes_every_kind(tmp_path, kind):
    path = tmp_path / f"a.{kind.rpartition('.')[2]}"
    path.write_bytes(KINDS[kind][0]())
    pixels = data.read_rgb(path)
    assert pixels.shape == (30, 40, 3) and pixels.dtype == np.uint8
    if not kind.startswith("16 bit"):
        with Image.open(path) as image:
            assert np.abs(np.int32(pixels) - np.asarray(image.convert("RGB"))).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "16 bit"])
def test_orientation(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[data.EXIF_ORIENTATION] = orientation
    path = tmp_path / "a.png"
    if kind == "16 bit":
        path.write_bytes(insert_chunk(png_16(RGB_16), b"eXIf", exif.tobytes()[6:]))
        upright = ImageOps.exif_transpose(
            Image.open(io.BytesIO(saved(Image.fromarray(data.to_8_bit(RGB_16)), "PNG", exif=exif)))
        )
    else:
        Image.fromarray(RGB).save(path, kind, exif=exif.tobytes())
        upright = ImageOps.exif_transpose(Image.open(path))
    assert np.array_equal(data.read_rgb(path), np.asarray(upright))
    assert data.read_rgb(path).shape == ((30, 40, 3) if orientation < 5 else (40, 30, 3))
    main.upscale_image(nearest, path, tmp_path / "b.jpg")
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.getexif().get(data.EXIF_ORIENTATION, 1) == 1
        assert image.size == tuple(4 * side for side in upright.size)


def camera_exif():
    exif = Image.Exif()
    exif[271], exif[306], exif[data.EXIF_ORIENTATION] = "Maker", "2020:01:02 03:04:05", 6
    details = exif.get_ifd(data.EXIF_CAMERA)
    details.update({data.EXIF_WIDTH: 40, data.EXIF_HEIGHT: 30, 0x829D: 2.8, 0x927C: b"maker's own"})
    details[data.EXIF_INTEROPERABILITY] = {1: "R98"}
    exif.get_ifd(data.EXIF_GPS).update({1: "N", 2: (1.0, 2.0, 3.0)})
    return exif


@pytest.mark.parametrize("source", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("target", ["jpg", "png", "webp", "tif"])
def test_metadata_is_kept_and_corrected(tmp_path, source, target):
    Image.fromarray(RGB).save(tmp_path / f"a.{source}", exif=camera_exif().tobytes(), icc_profile=SRGB)
    main.upscale_image(nearest, tmp_path / f"a.{source}", tmp_path / f"b.{target}")
    with Image.open(tmp_path / f"b.{target}") as image:
        assert image.size == (120, 160) and image.info["icc_profile"] == SRGB
        exif = image.getexif()
        assert (exif[271], exif[306], exif.get(data.EXIF_ORIENTATION, 1)) == ("Maker", "2020:01:02 03:04:05", 1)
        details = exif.get_ifd(data.EXIF_CAMERA)
        assert (details[data.EXIF_WIDTH], details[data.EXIF_HEIGHT], float(details[0x829D])) == (120, 160, 2.8)
        assert data.EXIF_INTEROPERABILITY not in details
        assert exif.get_ifd(data.EXIF_GPS)[1] == "N"


def test_metadata_of_16_bit_png(tmp_path):
    png = insert_chunk(png_16(RGB_16), b"eXIf", camera_exif().tobytes()[6:])
    (tmp_path / "a.png").write_bytes(insert_chunk(png, b"iCCP", b"sRGB\0\0" + zlib.compress(SRGB)))
    main.upscale_image(nearest, tmp_path / "a.png", tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as image:
        assert image.info["icc_profile"] == SRGB and image.getexif()[271] == "Maker" and image.size == (120, 160)


def test_a_colour_profile_does_not_go_with_grey(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.jpg", icc_profile=SRGB)
    main.upscale_image(nearest, tmp_path / "a.jpg", tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as image:
        assert image.mode == "L" and "icc_profile" not in image.info


def test_damaged_or_too_much_exif_is_left_out(tmp_path):
    exif = Image.Exif()
    exif[270] = "x" * 70_000
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    with pytest.warns(UserWarning, match="left out"):
        main.upscale_image(nearest, tmp_path / "a.png", tmp_path / "b.jpg")
    Image.fromarray(RGB).save(tmp_path / "c.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xffnonsense")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main.upscale_image(nearest, tmp_path / "c.jpg", tmp_path / "d.jpg")
    assert data.read_rgb(tmp_path / "d.jpg").shape == (120, 160, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(tmp_path, kind):
    frames = [Image.fromarray(RGB // 64 * 64), Image.new("RGB", (40, 30))]
    path = tmp_path / f"a.{kind.lower()}"
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(path, kind, save_all=True, append_images=frames[1:], **options)
    with pytest.warns(UserWarning, match="2 frames: only the first"):
        pixels = data.read_rgb(path)
    assert np.array_equal(pixels, np.asarray(frames[0]))


def test_colours_under_transparency_do_not_bleed(tmp_path):
    """A red disc on transparent black stays red at its edge, through an interpolation, and on white."""
    y, x = np.mgrid[:45, :51]
    alpha = np.uint8(255 * ((y - 20) ** 2 + (x - 30) ** 2 < 200))
    red = np.uint8([200, 30, 30]) * (alpha > 0)[..., None]
    spread = data.spread_colours(red, alpha)
    assert np.array_equal(spread, np.broadcast_to(np.uint8([200, 30, 30]), red.shape))
    Image.fromarray(np.dstack([red, alpha])).save(tmp_path / "a.png")
    main.upscale_image(lambda lr, progress: data.bicubic(lr), tmp_path / "a.png", tmp_path / "b.png")
    made = data.read_image(tmp_path / "b.png")
    assert np.abs(np.int32(made.pixels[made.alpha > 0]) - [200, 30, 30]).max() <= 1
    with pytest.warns(UserWarning, match="on white"):
        main.upscale_image(lambda lr, progress: data.bicubic(lr), tmp_path / "a.png", tmp_path / "b.bmp")
    assert data.read_rgb(tmp_path / "b.bmp")[0, 0].tolist() == [255, 255, 255]
    assert data.read_rgb(tmp_path / "b.bmp")[..., 0].min() >= 199


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "gif"])
def test_truncated_images_are_one_line(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(make_image(0, 128, 96)).save(path)
    whole = path.read_bytes()
    for length in (0, 20, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError) as error:
            data.read_rgb(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_images_are_read_or_refused_in_one_line(tmp_path, kind):
    path, rng = tmp_path / "a.png", np.random.default_rng(0)
    whole = np.frombuffer(KINDS[kind][0](), np.uint8)
    for _ in range(20):
        damaged = whole.copy()
        damaged[rng.integers(0, len(damaged), 5)] = rng.integers(0, 256, 5)
        path.write_bytes(damaged)
        try:
            assert data.read_rgb(path).shape[2] == 3
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("kind", ["float", "12 bits", "white is zero"])
def test_grey_tiffs_that_are_refused(tmp_path, kind):
    content = saved(Image.fromarray(np.float32(GREY) if kind == "float" else RGB_16[..., 0]), "TIFF")
    if kind != "float":
        tag, value = {"12 bits": (258, 12), "white is zero": (262, 0)}[kind]
        start = content.index(struct.pack("<HHI", tag, 3, 1)) + 8
        content = content[:start] + struct.pack("<H", value) + content[start + 2 :]
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(ValueError, match="a.tif.*PNG of 8 or 16 bits"):
        data.read_image(tmp_path / "a.tif")


def test_a_missing_image_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="can't read .*b.tif: No such file"):
        data.read_image(tmp_path / "b.tif")


def test_transparent_colour_of_16_bit_png(tmp_path):
    """PngSuite's tbbn2c16 and tbwn0g16: one colour is transparent, and others that differ in the low byte are not."""
    for pixels, key in ((RGB_16.copy(), slice(0, 3)), (RGB_16[..., :1].copy(), slice(0, 1))):
        pixels[0, 1] = pixels[0, 0] ^ 1
        content = pixels[0, 0, key].astype(">u2").tobytes()
        (tmp_path / "a.png").write_bytes(insert_chunk(png_16(pixels), b"tRNS", content))
        image = data.read_image(tmp_path / "a.png")
        assert np.array_equal(image.pixels, pixels) and image.pixels.dtype == np.uint16
        assert image.alpha[0, 0] == 0 and image.alpha.ravel()[1:].min() == 65_535


def test_exif_after_the_pixels(tmp_path):
    """Where ExifTool writes it."""
    exif = Image.Exif()
    exif[data.EXIF_ORIENTATION] = 6
    png = insert_chunk(png_16(RGB_16), b"eXIf", exif.tobytes()[6:], place=-12)
    (tmp_path / "a.png").write_bytes(png)
    assert np.array_equal(data.read_image(tmp_path / "a.png").pixels, np.rot90(RGB_16, 3))
    (tmp_path / "a.png").write_bytes(png[: len(png) // 2])
    with pytest.raises(ValueError, match=r"a\.png: image file is truncated"):
        data.read_image(tmp_path / "a.png")


@pytest.mark.parametrize("profile", [SRGB, b"damaged"])
def test_cmyk_with_a_useless_profile_is_read_without_it(tmp_path, profile):
    (tmp_path / "a.jpg").write_bytes(KINDS["cmyk.jpg"][0]())
    expected = data.read_rgb(tmp_path / "a.jpg")
    cmyk = Image.fromarray(RGB).convert("CMYK")
    cmyk.save(tmp_path / "b.jpg", quality=100, subsampling=0, icc_profile=profile)
    with pytest.warns(UserWarning, match="b.jpg: its colour profile .* ignored"):
        image = data.read_image(tmp_path / "b.jpg")
    assert np.array_equal(image.pixels, expected) and image.icc is None


def test_a_valid_image_may_have_any_number_of_pixels(tmp_path, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's limit is twice this
    assert np.array_equal(data.read_rgb(tmp_path / "a.png"), RGB)


def test_other_formats_are_not_opened_under_a_known_suffix(tmp_path):
    """An EPS would start Ghostscript."""
    for kind in ("EPS", "PPM", "TGA", "PCX"):
        Image.fromarray(RGB).save(tmp_path / "a.png", kind)
        with pytest.raises(ValueError, match="a.png is not a PNG, JPEG, WebP, TIFF, BMP or GIF image"):
            data.read_image(tmp_path / "a.png")


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")  # reading it would wait forever
    for path in (tmp_path / "a.jpg", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match=f"can't read {path}: it is not a regular file"):
            data.read_image(path)
    assert data.list_images(tmp_path) == []


def test_an_unreadable_file_is_not_called_no_image(tmp_path, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    if os.geteuid():
        (tmp_path / "a.png").chmod(0)
    else:  # root may read everything
        monkeypatch.setattr(Image, "open", denied)
    with pytest.raises(ValueError, match="can't read .*a.png: Permission denied"):
        data.read_image(tmp_path / "a.png")


def denied(*arguments, **options):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


# -------------------------------------------------------------------------------------------- the old file or the new


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
@pytest.mark.parametrize("deep", [False, True])
def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, suffix, deep):
    """Files may not grow beyond 1 kB: as on a full disk, writing breaks off in the middle."""
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"old")
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    image = data.ImageData(np.uint16(pixels) * 257 if deep else pixels)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with warnings.catch_warnings(), pytest.raises(OSError) as error:
            warnings.simplefilter("ignore")
            data.write_image(path, image)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in str(error.value)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]


def test_interrupted_before_the_rename_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def interrupt(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.write_image(path, data.ImageData(RGB))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.png"]


def test_writing_through_a_link_does_not_touch_what_it_points_to(tmp_path):
    (tmp_path / "precious.png").write_bytes(b"precious")
    (tmp_path / "a.png").symlink_to("precious.png")
    data.write_image(tmp_path / "a.png", data.ImageData(RGB))
    assert (tmp_path / "precious.png").read_bytes() == b"precious"
    assert np.array_equal(data.read_rgb(tmp_path / "a.png"), RGB)


@pytest.mark.parametrize("suffix", data.FORMATS)
def test_the_longest_sides_are_what_the_formats_hold(tmp_path, suffix):
    kind, longest = data.FORMATS[suffix]
    if longest < 10**6:
        data.write_image(tmp_path / f"a{suffix}", data.ImageData(np.zeros((1, longest, 1), np.uint8)))
        with pytest.raises((OSError, ValueError)):
            data.write_image(tmp_path / f"a{suffix}", data.ImageData(np.zeros((1, longest + 1, 1), np.uint8)))
    side = longest // data.SCALE
    data.check_output(tmp_path / f"a{suffix}", side, 1)
    with pytest.raises(ValueError, match="more than the"):
        data.check_output(tmp_path / f"a{suffix}", side + 1, 1)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_a_result_takes_the_mode_of_the_file_that_it_replaces(tmp_path, mode):
    (tmp_path / "a.png").touch()
    (tmp_path / "a.png").chmod(mode)
    data.write_image(tmp_path / "a.png", data.ImageData(RGB))
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == mode


def test_a_new_result_has_the_usual_mode(tmp_path):
    before = os.umask(0o027)
    try:
        data.write_image(tmp_path / "a.png", data.ImageData(RGB))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o640


def test_atomic_writes_at_once_do_not_meet(tmp_path):
    """As from two containers, whose process ids are equal."""
    with data.atomic_write(tmp_path / "a.weights.h5") as first, data.atomic_write(tmp_path / "a.weights.h5") as second:
        assert first != second and first.name.endswith(".weights.h5") and not first.exists()
        assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700  # nobody else can plant a link
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a.weights.h5").read_text() == "first" and os.listdir(tmp_path) == ["a.weights.h5"]


def test_what_killed_processes_left_is_removed_after_an_hour(tmp_path):
    for name in (".srgan-abcdefgh.tmp", ".srgan-12345678.tmp", ".srgan-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").touch()
        if name != ".srgan-12345678.tmp":
            os.utime(tmp_path / name, (time.time() - 4000,) * 2)
    data.write_image(tmp_path / "a.png", data.ImageData(RGB))
    assert sorted(os.listdir(tmp_path)) == [".srgan-12345678.tmp", ".srgan-mine", "a.png"]


def test_outputs_are_regular_files(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "null.png").symlink_to("/dev/null")
    (tmp_path / "folder.png").mkdir()
    for name in ("fifo", "null", "folder"):
        with pytest.raises(OSError, match=f"can't write .*{name}.png: it is not a regular file"):
            data.write_image(tmp_path / f"{name}.png", data.ImageData(RGB))
    for path in (tmp_path / "nowhere" / "a.png", Path("/proc/a.png")):
        with pytest.raises(OSError, match="can't write .*a.png: "):
            data.write_image(path, data.ImageData(RGB))
