"""Uploads are measured before they are unpacked."""

import resource
import struct
import tracemalloc
import zlib

import pytest
from PIL import Image

from fpe_pipeline.errors import InputError
from fpe_pipeline.studio import uploads
from fpe_pipeline.studio.uploads import MOST_PIXELS, admitted_photo, admitted_record


def png(path, width, height, data, depth=8, kind=2):
    """A PNG of a header and any data."""
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", data), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def header(path, width, height):
    """A PNG that says a size and has next to no pixels."""
    return png(path, width, height, b"\x00")


def bomb(path, side=18_500):
    """A PNG of a hundred kilobytes, or fewer, that is a gigabyte as RGB: as large as it says, and black."""
    return png(path, side, side, zlib.compress(bytes((1 + -(-side // 8)) * side), 9), depth=1, kind=0)


@pytest.fixture
def saved(tmp_path):
    return tmp_path / "visitor" / "upload.png"


def test_a_bomb_is_refused_without_being_unpacked(tmp_path, saved):
    path = bomb(tmp_path / "bomb.png")
    assert path.stat().st_size < 100_000 and 3 * 18_500**2 > 1e9
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="at most 40 million"):
        admitted_photo(path, saved)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB; Pillow's own memory is not Python's
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20 and grown < 30 << 10 and not saved.exists()


def test_fifty_megapixels(tmp_path, saved):
    with pytest.raises(InputError, match="10000 x 5000 = 50 million"):
        admitted_photo(header(tmp_path / "large.png", 10_000, 5_000), saved)
    assert MOST_PIXELS < 10_000 * 5_000


def test_too_many_bytes(tmp_path, saved, monkeypatch):
    monkeypatch.setattr(uploads, "MOST_BYTES", 1 << 20)
    path = tmp_path / "long.png"
    path.write_bytes(bytes(2 << 20))
    with pytest.raises(InputError, match="has 2 MiB; pass one of at most 1 MiB"):
        admitted_photo(path, saved)


@pytest.mark.parametrize("content", [b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a" + bytes(40), b"%PDF"])
def test_no_picture(tmp_path, saved, content):
    path = tmp_path / "file.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a picture in a format that is read here; pass a PNG, JPEG, WEBP"):
        admitted_photo(path, saved)
    assert not saved.exists()


def test_a_picture_that_is_cut_off(tmp_path, saved):
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:900])
    with pytest.raises(InputError, match="damaged"):
        admitted_photo(cut, saved)


def test_only_pixels_are_kept(tmp_path, saved):
    """Places and names that a camera writes beside a photo stay out of what the page serves."""
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "where I live", 6
    Image.linear_gradient("L").resize((80, 40)).save(path, exif=exif)
    admitted_photo(path, saved)
    with Image.open(saved) as kept:
        assert kept.size == (40, 80) and kept.mode == "RGB"
        assert not kept.getexif() and "where I live" not in str(kept.info)


def test_large_pictures_are_scaled(tmp_path, saved):
    path = tmp_path / "wide.png"
    Image.new("RGB", (4096, 1024)).save(path)
    with Image.open(admitted_photo(path, saved)) as kept:
        assert kept.size == (2048, 512)


def test_records(tmp_path):
    with pytest.raises(InputError, match="no PNG"):
        other = tmp_path / "a.png"
        other.write_bytes(b"GIF89a")
        admitted_record(other)
    with pytest.raises(InputError, match="million"):
        admitted_record(header(tmp_path / "b.png", 18_500, 18_500))
