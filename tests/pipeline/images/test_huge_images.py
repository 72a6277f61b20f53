"""Huge pictures: little more memory than decoding them takes, and the pixels that scaling them whole would give."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpe_pipeline.images import load as images
from fpe_pipeline.images.load import load_image

ROOT = Path(__file__).parents[3]
HUGE = (8960, 6720)  # 60 Mpx
MB = 1_000_000

# A forked process counts its peak from the memory that it starts with.
PEAK = """
import os, re, sys
from fpe_pipeline.images.load import load_image

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1))

for path in sys.argv[1:]:
    if os.fork() == 0:
        before = kilobytes("VmRSS")
        load_image(path)
        print(1024 * (kilobytes("VmHWM") - before), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads VmHWM from /proc")
def test_memory(tmp_path):
    """Beyond the decoded picture: bands, and the averages that the result is scaled from."""
    bytes_a_pixel = {"RGBA": 4, "I;16": 2, "P": 1}
    paths = [tmp_path / f"{number}.png" for number in range(len(bytes_a_pixel))]
    for mode, path in zip(bytes_a_pixel, paths, strict=True):
        Image.new(mode, HUGE).save(path, compress_level=1, **({"transparency": 0} if mode == "P" else {}))
    command = [sys.executable, "-c", PEAK, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    for (mode, size), peak in zip(bytes_a_pixel.items(), map(int, result.stdout.split()), strict=True):
        decoded = HUGE[0] * HUGE[1] * size
        assert 0.9 * decoded <= peak <= decoded + 64 * MB, mode


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("size", [(None, None), (80, 128)])
def test_pixels(monkeypatch, orientation, mode, size):
    """Sides that averages do not divide, in bands, turned: as if it were scaled from all pixels."""
    colours = np.random.default_rng(0).integers(0, 256, (9, 12, len(mode)), np.uint8)
    picture = Image.fromarray(colours, mode).resize((1001, 701), Image.Resampling.BICUBIC)
    picture.getexif()[0x0112] = orientation
    whole = load_image(picture, size, pixels=96 * 64)
    monkeypatch.setattr(images, "ORDINARY_PIXELS", 2**12)
    monkeypatch.setattr(images, "BAND_PIXELS", 2**13)
    reduced = load_image(picture, size, pixels=96 * 64)
    assert reduced.size == whole.size
    difference = np.abs(np.asarray(reduced, int) - np.asarray(whole, int))
    # Unturned, the averages are those that scaling makes by itself.
    assert difference.max() <= (0 if orientation == 1 else 2)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "F"])
def test_bands_are_seamless(monkeypatch, mode):
    grey = Image.linear_gradient("L").resize((48, 64))
    picture = grey.convert("RGB").convert(mode) if mode not in ("I;16", "F", "LA", "PA") else grey.convert(mode)
    picture = picture if mode != "F" else Image.fromarray(np.asarray(grey, np.float32) / 255)
    whole = np.asarray(load_image(picture, (48, 64)))
    monkeypatch.setattr(images, "BAND_PIXELS", 7 * 48)
    assert np.array_equal(np.asarray(load_image(picture, (48, 64))), whole)
