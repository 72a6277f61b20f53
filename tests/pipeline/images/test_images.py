"""Pictures as users have them: every mode, turned, huge, damaged."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features

from fpe_pipeline.errors import InputError
from fpe_pipeline.images.load import PIXEL_LIMIT, fitted_size, load_image, to_tensor

QUARTERS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))


def quarters(width=64, height=32):
    """Red, green, blue and yellow: top left, top right, bottom left, bottom right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = QUARTERS[0]
    pixels[: height // 2, width // 2 :] = QUARTERS[1]
    pixels[height // 2 :, : width // 2] = QUARTERS[2]
    pixels[height // 2 :, width // 2 :] = QUARTERS[3]
    return Image.fromarray(pixels)


def corners(image):
    """Colours well inside the four quarters, rounded to what 0 and 255 compress to."""
    across, down = image.width // 4, image.height // 4
    points = ((across, down), (3 * across, down), (across, 3 * down), (3 * across, 3 * down))
    return tuple(tuple(255 if value > 127 else 0 for value in image.getpixel(point)) for point in points)


def same_size(image):
    return load_image(image, (64, 32))


class TestModes:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("large", [False, True])
    def test_exif_orientation(self, tmp_path, orientation, large):
        """The file is stored as a camera would; large JPEGs are unpacked at a fraction of their size."""
        undo = {
            2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270,
        }  # fmt: skip
        picture = quarters(1024, 512) if large else quarters()
        stored = picture.transpose(undo[orientation]) if orientation in undo else picture
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / "photo.jpg", exif=exif, quality=95)
        loaded = same_size(tmp_path / "photo.jpg")
        assert loaded.size == (64, 32)
        assert corners(loaded) == QUARTERS

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("suffix", ["tif", "png", "webp"])
    def test_orientation_is_applied_once(self, tmp_path, orientation, suffix):
        """Pillow turns a TIFF itself while it unpacks it, and no other format."""
        exif = Image.Exif()
        exif[0x0112] = orientation
        quarters().save(tmp_path / f"photo.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {}))
        quarters().save(tmp_path / "photo.jpg", exif=exif, quality=95)
        one, other = (load_image(tmp_path / f"photo.{name}", multiple=1, pixels=64 * 32) for name in (suffix, "jpg"))
        assert one.size == other.size == ((64, 32) if orientation < 5 else (32, 64))
        assert corners(one) == corners(other)

    @pytest.mark.parametrize("mode", ["P", "CMYK", "YCbCr", "HSV"])
    def test_colour_modes(self, mode):
        assert corners(same_size(quarters().convert(mode))) == QUARTERS

    @pytest.mark.parametrize("mode", ["1", "L"])
    def test_grey_modes(self, mode):
        grey = Image.new("L", (64, 32), 255).convert(mode)
        assert same_size(grey).getpixel((5, 5)) == (255, 255, 255)

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
    def test_transparency_shows_white(self, mode):
        clear = Image.new("RGBA", (64, 32), (0, 0, 0, 0))
        clear.paste((0, 0, 0, 255), (0, 0, 32, 32))
        image = clear.convert("LA").convert(mode) if mode == "La" else clear.convert(mode)
        loaded = same_size(image)
        assert loaded.getpixel((5, 5)) == (0, 0, 0)
        assert loaded.getpixel((60, 5)) == (255, 255, 255)

    def test_a_palette_with_a_transparent_entry(self, tmp_path):
        image = Image.new("P", (64, 32), 1)
        image.putpalette([0, 0, 0, 200, 0, 0])
        image.paste(0, (0, 0, 32, 32))
        image.save(tmp_path / "icon.gif", transparency=0)
        loaded = same_size(tmp_path / "icon.gif")
        assert loaded.getpixel((5, 5)) == (255, 255, 255)
        assert loaded.getpixel((60, 5)) == (200, 0, 0)

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    def test_sixteen_bits(self, tmp_path, suffix):
        values = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16).repeat(32, 1).repeat(16, 0)
        Image.fromarray(values).save(tmp_path / f"grey.{suffix}")
        for source in (tmp_path / f"grey.{suffix}", values):
            loaded = np.asarray(same_size(source))
            assert np.array_equal(loaded[..., 1], (values / 257).astype(np.uint8))
            assert np.array_equal(loaded[..., 0], loaded[..., 2])

    def test_the_first_frame_of_an_animation(self, tmp_path):
        frames = [Image.new("RGB", (64, 32), colour) for colour in QUARTERS[:2]]
        frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
        assert same_size(tmp_path / "clip.gif").getpixel((5, 5)) == QUARTERS[0]


class TestArrays:
    def test_layouts_agree(self):
        expected = np.asarray(quarters())
        floats = expected.astype(np.float32) / 255
        channels_first = torch.from_numpy(floats).permute(2, 0, 1)
        for image in (expected, floats, floats.astype(np.float64), channels_first, channels_first[None],
                      channels_first.to(torch.bfloat16), (channels_first * 255).byte(), quarters()):  # fmt: skip
            assert np.array_equal(np.asarray(same_size(image)), expected)

    def test_grey_and_transparent_arrays(self):
        assert same_size(np.ones((32, 64, 1))).getpixel((0, 0)) == (255, 255, 255)
        assert same_size(np.zeros((32, 64))).getpixel((0, 0)) == (0, 0, 0)
        assert same_size(np.zeros((32, 64, 4), np.uint8)).getpixel((0, 0)) == (255, 255, 255)

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (np.full((8, 8, 3), -0.5), r"values from -0.5 to -0.5; rescale them, such as \(x \+ 1\) / 2"),
            (np.full((8, 8, 3), np.nan), "values from nan"),
            (np.full((8, 8, 3), 70000), "from 70000"),
            (np.zeros((8, 8, 5)), r"shape \[8, 8, 5\]"),
            (np.zeros((2, 8, 8, 3)), r"shape \[2, 8, 8, 3\]"),
            (torch.zeros(2, 3, 8, 8), r"got a Tensor of torch.float32 and shape \[2, 3, 8, 8\]"),
            (np.zeros((0, 8, 3)), "no pixels"),
            (Image.new("RGB", (0, 5)), "its size is 0x5"),
            (7, "got int"),
            (None, "got NoneType"),
        ],
    )
    def test_what_is_no_picture(self, image, message):
        with pytest.raises(InputError, match=message):
            load_image(image)

    def test_tensor_for_the_autoencoder(self):
        tensor = to_tensor(quarters())
        assert tensor.shape == (1, 3, 32, 64)
        assert tensor.is_contiguous()
        assert tensor[0, :, 0, 0].tolist() == [1.0, -1.0, -1.0]


class TestSizes:
    @pytest.mark.parametrize(
        ("given", "size", "expected"),
        [
            ((512, 512), (None, None), (512, 512)),
            ((4000, 3000), (None, None), (592, 440)),
            ((3000, 4000), (None, None), (440, 592)),
            ((100, 10), (None, None), (1616, 160)),
            ((3, 5000), (None, None), (16, 20904)),
            ((4000, 3000), (512, None), (512, 384)),
            ((4000, 3000), (None, 512), (680, 512)),
            ((4000, 3000), (96, 640), (96, 640)),
        ],
    )
    def test_rule(self, given, size, expected):
        assert fitted_size(given, size, 8, 512 * 512) == expected

    @pytest.mark.parametrize(("size", "message"), [((60, None), "width .* got 60; use 64"), ((8, 0), "height")])
    def test_sides_that_are_no_multiples(self, size, message):
        with pytest.raises(InputError, match=message):
            fitted_size((64, 64), size, 8, 4096)

    @pytest.mark.parametrize("size", [(None, None), (512, None)])
    def test_lines_are_no_pictures(self, size):
        """They became 57244 x 4 pixels of a model of 128 x 128, which ran for hours."""
        with pytest.raises(InputError, match=r"200000x1 pixels is too long .* cut it, or give both"):
            fitted_size((200000, 1), size, 4, 128 * 128)
        assert fitted_size((200000, 1), (512, 8), 4, 128 * 128) == (512, 8)

    def test_the_middle_is_kept(self):
        """A white frame around a black middle: what is cut off is the frame on the long sides."""
        image = Image.new("RGB", (100, 40), (255, 255, 255))
        image.paste((0, 0, 0), (30, 0, 70, 40))
        assert load_image(image, (40, 40)).getextrema() == ((0, 0),) * 3
        assert load_image(image.transpose(Image.Transpose.ROTATE_90), (40, 40)).getextrema() == ((0, 0),) * 3

    def test_an_image_of_the_right_size_is_untouched(self):
        noise = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
        assert np.array_equal(np.asarray(same_size(noise)), noise)

    @pytest.mark.parametrize("suffix", ["png", "jpg"])
    def test_callers_images_stay_open_and_as_they_were(self, tmp_path, suffix):
        """A JPEG too, which can be unpacked at a part of its size."""
        path = tmp_path / f"a.{suffix}"
        quarters().save(path)
        with Image.open(path) as image:
            load_image(image, (8, 8))
            assert image.size == (64, 32)
            assert corners(image) == QUARTERS


class TestDamage:
    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif"])
    def test_truncated(self, tmp_path, suffix):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
        buffer = io.BytesIO()
        noise.save(buffer, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
        path = tmp_path / f"half.{suffix}"
        path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        with pytest.raises(InputError, match=r"half\.\w+' is (damaged|not a picture)"):
            load_image(path)

    @pytest.mark.parametrize("content", [b"", b"GIF89a", b"not a picture at all"])
    def test_not_a_picture(self, tmp_path, content):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(InputError, match=r"not a picture|damaged"):
            load_image(tmp_path / "x.png")

    def test_flipped_bits(self, tmp_path):
        buffer = io.BytesIO()
        quarters().save(buffer, "png")
        data = bytearray(buffer.getvalue())
        data[data.index(b"IDAT") + 8] ^= 0xFF
        (tmp_path / "x.png").write_bytes(data)
        with pytest.raises(InputError, match="damaged"):
            load_image(tmp_path / "x.png")

    def test_files_that_unpack_to_more_than_memory(self, tmp_path):
        side = int(PIXEL_LIMIT**0.5) + 1

        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(b"\0" * 999))
            + chunk(b"IEND", b"")
        )
        (tmp_path / "bomb.png").write_bytes(bomb)
        with pytest.raises(InputError, match=f"unpacks to more than {PIXEL_LIMIT} pixels"):
            load_image(tmp_path / "bomb.png")

    def test_a_header_that_is_none(self, tmp_path):
        (tmp_path / "x.ppm").write_bytes(b"P6\n8 8\n300x\n" + bytes(192))
        with pytest.raises(InputError, match=r"x\.ppm' is damaged: invalid literal"):
            load_image(tmp_path / "x.ppm")

    def test_text_that_unpacks_to_megabytes(self, tmp_path):
        text = PngImagePlugin.PngInfo()
        text.add_text("comment", "a" * 2**21, zip=True)
        quarters().save(tmp_path / "x.png", pnginfo=text)
        with pytest.raises(InputError, match=r"x\.png' is damaged: Decompressed data too large"):
            load_image(tmp_path / "x.png")

    @pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
    def test_planes_that_do_not_decode(self, tmp_path):
        buffer = io.BytesIO()
        quarters().save(buffer, "avif")
        data = bytearray(buffer.getvalue())
        data[-1] ^= 0xFF
        (tmp_path / "x.avif").write_bytes(data)
        with pytest.raises(InputError, match=r"x\.avif' is damaged: Failed to decode"):
            load_image(tmp_path / "x.avif")

    @pytest.mark.parametrize("error", [RuntimeError("no memory"), ValueError("no header"), IndexError("tile")])
    @pytest.mark.parametrize("place", ["open", "load"])
    def test_errors_of_any_kind(self, tmp_path, monkeypatch, error, place):
        quarters().save(tmp_path / "x.png")

        def fail(*args, **kwargs):
            raise error

        if place == "open":
            monkeypatch.setattr(Image, "open", fail)
        else:
            monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
        with pytest.raises(InputError, match=rf"x\.png' is damaged: .*{error.args[0]}.*; save it again"):
            load_image(tmp_path / "x.png")

    def test_files_that_are_not_there(self, tmp_path):
        with pytest.raises(InputError, match=r"cannot read '.*nowhere.png': No such file"):
            load_image(tmp_path / "nowhere.png")
        with pytest.raises(InputError, match="cannot read"):
            load_image(str(tmp_path))
