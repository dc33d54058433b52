"""Decoding: every kind of pixel to uint8 RGB, and errors that name the file for what is none."""

from __future__ import annotations

import os
import struct
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import trees
from PIL import Image

from cellops.models.data import ImageError, open_data, read_image, scan
from cellops.models.data import images as decoding

RED = (200, 30, 40)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm"])
def test_rgb_as_it_is(tmp_path: Path, suffix: str) -> None:
    pixels = trees.picture(1)
    found = read_image(trees.write(tmp_path / f"a.{suffix}", pixels))
    assert found.dtype == np.uint8 and found.shape == (20, 24, 3)
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_lossy_formats_are_near(tmp_path: Path, suffix: str) -> None:
    pixels = trees.picture(1, (64, 64))
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(pixels), quality=95)
    assert np.abs(read_image(path).astype(int) - pixels).mean() < 4


def test_one_bit(tmp_path: Path) -> None:
    bits = trees.disc((12, 10), 1) > 0
    found = read_image(saved(tmp_path / "a.png", Image.fromarray(bits)))
    np.testing.assert_array_equal(found, np.repeat(np.where(bits, 255, 0)[..., None], 3, 2))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_the_whole_range(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257, 25700], [32896, 65278, 65535]], dtype=np.uint16)
    found = read_image(saved(tmp_path / f"a.{suffix}", Image.fromarray(values)))
    assert found[..., 0].tolist() == [[0, 1, 100], [128, 254, 255]]


@pytest.mark.parametrize(("highest", "told"), [(4095, True), (255, True), (4096, False), (65535, False)])
def test_twelve_bits_stored_in_sixteen_are_noted(tmp_path: Path, highest: int, told: bool) -> None:
    for number in range(4):
        values = (trees.picture(number)[..., 0] / 255 * highest).astype(np.uint16)
        values[0, 0] = highest
        trees.write(tmp_path / "ab"[number % 2] / f"{number}.tif", values)
    trees.write(tmp_path / "a" / "grey.png", trees.picture(9))
    (tmp_path / "b" / "broken.tif").write_bytes(b"II")
    data = open_data(tmp_path)
    text = f"The 16-bit images use little of their range (at most {highest} of 65535 in 4 looked at)"
    assert any(text in note for note in data.notes) == told
    assert data.read(0).max() == round(highest / 257)  # and the pixels stay what they were


def test_thirty_two_bits_only_within_sixteen(tmp_path: Path) -> None:
    found = read_image(saved(tmp_path / "a.tif", Image.fromarray(np.array([[0, 65535]], dtype=np.int32))))
    assert found[0, :, 0].tolist() == [0, 255]
    for values in (np.array([[0, 70000]], np.int32), np.array([[-1, 5]], np.int32)):
        with pytest.raises(ImageError, match=r"b.tif: pixels from -?\d+ to \d+ are neither of 8 nor of 16 bits"):
            read_image(saved(tmp_path / "b.tif", Image.fromarray(values)))
    with pytest.raises(ImageError, match=r"c.tif: floating-point pixels have no known range"):
        read_image(saved(tmp_path / "c.tif", Image.fromarray(np.ones((2, 2), np.float32))))


def test_cmyk_grey_palette_and_gif(tmp_path: Path) -> None:
    plain = Image.new("RGB", (8, 6), RED)
    grey = read_image(saved(tmp_path / "grey.png", Image.new("L", (8, 6), 77)))
    assert grey.shape == (6, 8, 3) and (grey == 77).all()
    found = {
        "cmyk": saved(tmp_path / "cmyk.jpg", plain.convert("CMYK"), quality=98),
        "palette": saved(tmp_path / "palette.png", plain.convert("P", palette=Image.Palette.ADAPTIVE)),
        "gif": saved(tmp_path / "a.gif", plain, save_all=True, append_images=[Image.new("RGB", (8, 6), "blue")] * 2),
        "pages": saved(tmp_path / "a.tif", plain, save_all=True, append_images=[Image.new("RGB", (8, 6), "blue")]),
    }
    for name, path in found.items():
        pixels = read_image(path)
        assert pixels.shape == (6, 8, 3), name
        assert np.abs(pixels.reshape(-1, 3).astype(int) - RED).max() < 26, name


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_lies_over_white(tmp_path: Path, mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.putpixel((1, 1), 1)
        path = saved(tmp_path / "a.png", image, transparency=0)
        wanted = (255, 0, 0)
    else:
        image = Image.new(mode, (4, 4), (0,) * len(mode))
        image.putpixel((1, 1), (*((10,) * (len(mode) - 1)), 255))
        path = saved(tmp_path / "a.png", image)
        wanted = (10, 10, 10)
    pixels = read_image(path)
    assert tuple(pixels[1, 1]) == wanted and tuple(pixels[0, 0]) == (255, 255, 255)


def test_exif_orientation_is_followed(tmp_path: Path) -> None:
    pixels = trees.picture(2, (32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    path = saved(tmp_path / "a.png", Image.fromarray(pixels), exif=exif)
    np.testing.assert_array_equal(read_image(path), np.rot90(pixels, -1))


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (60000, 60000)])
def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(width, height))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=r"bomb.png: .*(are refused|exceeds limit)"):
            read_image(path)
    assert decoding.MAX_PIXELS < 9000 * 9000


def test_truncated_files_and_other_files_are_named(tmp_path: Path) -> None:
    for suffix in ("jpg", "png", "bmp", "tif", "gif"):
        whole = saved(tmp_path / f"whole.{suffix}", Image.fromarray(trees.picture(3, (90, 80)))).read_bytes()
        for share in (0.97, 0.6, 0.2):
            path = tmp_path / f"cut{share}.{suffix}"
            path.write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(ImageError, match=rf"cut{share}.{suffix}: (cannot be decoded|not an image)"):
                read_image(path)
    for content in (b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM"):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ImageError, match=r"a.png: (cannot be decoded|not an image)"):
            read_image(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"nowhere.png: no such file"):
        read_image(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "."):
        with pytest.raises(ImageError, match="not a regular file"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "I;16"])
@pytest.mark.parametrize("interlaced", [False, True])
def test_a_png_of_fewer_rows_than_it_says(tmp_path: Path, mode: str, interlaced: bool) -> None:
    """Its data are whole, so that Pillow leaves the rest black without a word."""
    bits, kind, pixel = {"L": (8, 0, 1), "RGB": (8, 2, 3), "P": (8, 3, 1), "RGBA": (8, 6, 4)}.get(mode, (16, 0, 2))
    if mode == "1":
        bits, pixel = 1, 0.125
    side = 16
    passes = decoding.ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(side // across, side // down) for _, _, across, down in passes]
    rows = [b"\0" + b"\x7f" * max(1, int(columns * pixel)) for columns, height in sizes for _ in range(height)]
    palette = chunk(b"PLTE", bytes(768)) if mode == "P" else b""

    def written(rows: list[bytes]) -> Path:
        head = struct.pack(">IIBBBBB", side, side, bits, kind, 0, 0, interlaced)
        data = zlib.compress(b"".join(rows))
        parts = chunk(b"IHDR", head), palette, chunk(b"IDAT", data[:9]), chunk(b"IDAT", data[9:]), chunk(b"IEND", b"")
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
        return tmp_path / "a.png"

    assert read_image(written(rows)).shape == (side, side, 3)
    assert not read_image(written([b"\0" * len(row) for row in rows])).any() or mode == "RGBA"  # black, and whole
    with pytest.raises(ImageError, match=r"a\.png: cannot be decoded: its data end before its last row"):
        read_image(written(rows[:-1]))


def test_links_in_a_circle_are_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    os.symlink("b.png", tmp_path / "a.png")
    os.symlink("a.png", tmp_path / "b.png")
    with pytest.raises(ImageError, match=r"a\.png: "):
        read_image(tmp_path / "a.png", root=tmp_path)


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, convert, now, most = trees.write(tmp_path / "a.png", trees.picture(1)), decoding._rgb, [], []

    def slow(image: Image.Image, path: Path) -> Image.Image:
        now.append(1)
        most.append(len(now))
        time.sleep(0.01)
        now.pop()
        return convert(image, path)

    monkeypatch.setattr(decoding, "_rgb", slow)
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 100)
    threads = [threading.Thread(target=read_image, args=(path,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 6


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged tags
def test_damaged_files_are_never_another_error(tmp_path: Path) -> None:
    """Bytes flipped at random: an image or an ImageError, whatever the decoder makes of it."""
    random = np.random.default_rng(0)
    path = tmp_path / "damaged"
    for suffix in ("jpg", "png", "bmp", "tif", "gif", "webp"):
        whole = bytearray(saved(tmp_path / f"a.{suffix}", Image.fromarray(trees.picture(4, (40, 30)))).read_bytes())
        for _ in range(60):
            damaged = bytearray(whole)
            for place in random.integers(0, min(len(whole), 200), 4):
                damaged[place] = random.integers(256)
            path.write_bytes(damaged)
            try:
                pixels = read_image(path)
            except ImageError as error:
                assert "damaged" in str(error)
            else:
                assert pixels.dtype == np.uint8 and pixels.ndim == 3


def test_files_outside_the_root_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "data"
    trees.write(root / "a.png", trees.picture(1))
    outside = trees.write(tmp_path / "b.png", trees.picture(1))
    os.symlink(outside, root / "link.png")
    read_image(root / "a.png", root=root)
    for path in (outside, root / ".." / "b.png", root / "link.png"):
        with pytest.raises(ImageError, match=r"leads to .*b.png, outside the data folder"):
            read_image(path, root=root)
    with pytest.raises(ImageError, match="outside the data folder"):
        read_image(root / "a.png", root=root, mask=outside)


@pytest.mark.parametrize("high", [1, 255])
@pytest.mark.parametrize("mode", ["L", "RGB", "1", "I;16", "P"])
def test_masks_black_out_the_background(tmp_path: Path, mode: str, high: int) -> None:
    shape = trees.disc((24, 20), high)
    if mode == "I;16":
        mask = Image.fromarray(shape.astype(np.uint16))
    elif mode == "1":
        mask = Image.fromarray(shape > 0)
    elif mode == "P":
        mask = Image.fromarray((shape > 0).astype(np.uint8)).convert("P")
        mask.putpalette([0, 0, 0, high, high, high])
    else:
        mask = Image.fromarray(shape).convert(mode)
    pixels = np.maximum(trees.picture(5), 1)
    image = trees.write(tmp_path / "a.png", pixels)
    found = read_image(image, mask=saved(tmp_path / "a_mask.png", mask))
    np.testing.assert_array_equal(found, np.where(shape[..., None] > 0, pixels, 0))


def test_wrong_masks_are_named(tmp_path: Path) -> None:
    image = trees.write(tmp_path / "a.png", trees.picture(5))
    small = trees.write(tmp_path / "small_mask.png", trees.disc((20, 20), 255))
    with pytest.raises(ImageError, match=r"small_mask.png: the mask is \(20, 20\) pixels, its image \(24, 20\)"):
        read_image(image, mask=small)
    black = trees.write(tmp_path / "black_mask.png", np.zeros((20, 24), np.uint8))
    with pytest.raises(ImageError, match=r"black_mask.png: the mask is black everywhere"):
        read_image(image, mask=black)


@pytest.mark.parametrize("workers", [0, 3])
def test_scan_lists_what_cannot_be_used_in_order(tmp_path: Path, workers: int) -> None:
    root = trees.pbc(tmp_path, count=3)
    truncated = root / "basophil" / "BA_000001.jpg"
    truncated.write_bytes(truncated.read_bytes()[:200])
    (root / "platelet" / "PL_000002.jpg").write_text("no image")
    data = open_data(root)
    calls: list[tuple[int, int]] = []
    found = scan(data, workers=workers, progress=lambda done, total: calls.append((done, total)))
    assert [item.id for item in found] == ["basophil/BA_000001.jpg", "platelet/PL_000002.jpg"]
    assert str(truncated) in found[0].reason and "not an image" in found[1].reason
    assert calls == [(done, 24) for done in range(1, 25)]
    assert not scan(data.without([item.id for item in found]), workers=workers)
