"""Proves that images of every kind come out upright, opaque and RGB; bad ones name their file.

Expected pixels are computed by hand or by Pillow's own drawing, never by the loader.
"""

import base64
import io
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from xoron_core.errors import DataError
from xoron_vision.image import load_image, sample_image

RAMP = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10


def file_bytes(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def pixels(source, **options):
    image = load_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_the_same_picture_in_every_form_has_the_same_pixels(tmp_path):
    image = Image.fromarray(RAMP)
    data = file_bytes(image)
    path = tmp_path / "ramp.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    tensor = torch.from_numpy(RAMP).permute(2, 0, 1)
    forms = [path, str(path), data, bytearray(data), image, url, {"url": url}, RAMP, tensor]
    forms += [RAMP.astype(np.float32) / 255, tensor.double() / 255, RAMP.astype(np.int64)]
    forms += [RAMP.astype(np.uint16) * 257, RAMP / np.float64(255)]
    for form in forms:
        np.testing.assert_array_equal(pixels(form), RAMP)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = (255, 0, 0)
    # What a camera stores so that viewers who apply the tag show `upright`.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_bytes(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(pixels(data), upright)


def test_an_upright_rgb_image_is_not_copied_and_a_turned_one_not_changed():
    upright = Image.fromarray(RAMP)
    assert load_image(upright) is upright
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.open(io.BytesIO(file_bytes(upright, exif=exif)))
    np.testing.assert_array_equal(pixels(turned), np.rot90(RAMP, -1))
    np.testing.assert_array_equal(np.asarray(turned), RAMP)
    np.testing.assert_array_equal(pixels(turned), np.rot90(RAMP, -1))


def test_transparency_is_composited_on_white():
    rgba = Image.new("RGBA", (3, 1))
    for x, color in enumerate([(255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 51)]):
        rgba.putpixel((x, 0), color)
    expected = [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]
    np.testing.assert_array_equal(pixels(rgba), expected)
    np.testing.assert_array_equal(pixels(file_bytes(rgba)), expected)
    grey = Image.merge("LA", (Image.new("L", (1, 1), 0), Image.new("L", (1, 1), 0)))
    np.testing.assert_array_equal(pixels(grey), [[[255, 255, 255]]])
    keyed = file_bytes(Image.new("RGB", (1, 1), (9, 9, 9)), transparency=(9, 9, 9))
    np.testing.assert_array_equal(pixels(keyed), [[[255, 255, 255]]])


def test_palettes_keep_their_colours_and_their_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(pixels(file_bytes(image)), [[[10, 20, 30], [200, 100, 50]]])
    clear = file_bytes(image, "GIF", transparency=1)
    np.testing.assert_array_equal(pixels(clear), [[[10, 20, 30], [255, 255, 255]]])


def test_greys_of_one_eight_and_sixteen_bits():
    deep = np.array([[0, 257, 32768, 65535]], np.uint16)
    want = np.repeat(np.array([[0, 1, 128, 255]])[..., None], 3, axis=-1)
    for form in (
        deep,
        file_bytes(Image.fromarray(deep)),
        file_bytes(Image.fromarray(deep), "TIFF"),
    ):
        np.testing.assert_array_equal(pixels(form), want)
    shallow = Image.fromarray(np.array([[0, 7, 255]], np.uint8))
    np.testing.assert_array_equal(pixels(shallow)[0, :, 1], [0, 7, 255])
    np.testing.assert_array_equal(pixels(shallow.convert("1"))[0, :, 0], [0, 0, 255])
    np.testing.assert_array_equal(pixels(np.eye(2, dtype=bool))[..., 2], [[255, 0], [0, 255]])
    floats = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    np.testing.assert_array_equal(pixels(floats)[0, :, 0], [0, 128, 255])


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = pixels(file_bytes(image, "JPEG", quality=95)).astype(int)
    assert np.abs(red - (255, 0, 0)).max() <= 4


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    data = file_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels(data), np.full((4, 4, 3), (255, 0, 0)))
    moved = Image.open(io.BytesIO(data))
    moved.seek(2)
    np.testing.assert_array_equal(pixels(moved), np.full((4, 4, 3), (255, 0, 0)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_truncated_file_is_named_and_never_half_an_image(tmp_path, form):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = file_bytes(Image.fromarray(noise), form)
    path = tmp_path / f"cut.{form.lower()}"
    for length in (len(whole) // 2, len(whole) // 10, 20):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=f"cut.{form.lower()}"):
            load_image(path)


def test_a_truncated_image_that_pillow_opened_is_refused_too():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = file_bytes(Image.fromarray(noise))
    with pytest.raises(DataError, match="PIL image: the image is damaged"):
        load_image(Image.open(io.BytesIO(data[: len(data) // 2])))


def test_numbers_that_mean_no_grey_are_refused_with_the_file(tmp_path):
    path = tmp_path / "heat.tiff"
    for values in (np.full((2, 2), 300.0, np.float32), np.full((2, 2), 70_000, np.int32)):
        Image.fromarray(values).save(path)
        with pytest.raises(DataError, match=r"heat\.tiff: an image of"):
            load_image(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(file_bytes(Image.new("L", (40, 40))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1600)
    assert pixels(path).shape == (40, 40, 3)
    for limit in (1500, 500):  # where Pillow warns, and where it refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=r"bomb\.png: the image is too large"):
            load_image(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.png", "nowhere.png: cannot be read"),
        (b"no image at all", "image of 15 bytes: is no image"),
        (b"", "image of 0 bytes"),
        ("data:image/png;base64,@@", "no valid data: URL"),
        (3, "type int"),
        (None, "type NoneType"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), r"shape \(0, 8, 3\)"),
        (torch.zeros(8, 8, 3), r"shape \(8, 8, 3\)"),
        (np.full((2, 2), 1.5), "floats from 1.5 to 1.5"),
        (np.full((2, 2), np.nan), "floats from nan"),
        (np.full((2, 2), 256), "int64 outside"),
        (np.full((2, 2), -1), "int64 outside"),
    ],
)
def test_what_is_no_image_is_one_clear_error(source, message):
    with pytest.raises(DataError, match=message):
        load_image(source)


def test_urls_are_fetched_only_where_allowed(monkeypatch):
    body, asked = file_bytes(Image.fromarray(RAMP)), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if self.path == "/ok.png" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.delenv("XORON_IMAGE_URLS", raising=False)
    with pytest.raises(DataError, match="XORON_IMAGE_URLS=1"):
        load_image(f"{base}/ok.png")
    assert not asked
    np.testing.assert_array_equal(pixels(f"{base}/ok.png", allow_urls=True), RAMP)
    monkeypatch.setenv("XORON_IMAGE_URLS", "1")
    np.testing.assert_array_equal(pixels({"url": f"{base}/ok.png"}), RAMP)
    with pytest.raises(DataError, match=r"missing\.png: cannot be fetched"):
        load_image(f"{base}/missing.png")
    server.shutdown()
    server.server_close()


def test_samples_are_repeatable_and_differ_in_seed_and_size():
    assert [sample_image(0, size).shape for size in (1, 2, 3)] == [
        (32, 32 * s, 3) for s in (1, 2, 3)
    ]
    np.testing.assert_array_equal(sample_image(5, 2), sample_image(5, 2))
    assert (sample_image(5, 2) != sample_image(6, 2)).any()


def test_the_plug_in_and_the_loader_import_nothing_heavy():
    code = (
        "import sys, xoron_vision.plugin, xoron_vision.image\n"
        "heavy = {'torch', 'PIL', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
