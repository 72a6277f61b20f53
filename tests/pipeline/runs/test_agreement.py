"""How far a repeated run is from its record, wherever the record's pictures are."""

import numpy as np
from PIL import Image

from fpe_pipeline.images.distance import distance, pixel_hash
from fpe_pipeline.runs.agreement import differences


class Made:
    """A repeated run of one picture."""

    def __init__(self, image):
        self.image = image

    def record(self):
        images = {"target-1.png": {"pixels_sha256": pixel_hash(self.image)}}
        return {"images": images, "versions": {}, "machine": {}}

    def files(self):
        return {"target-1.png": (self.image, {})}


def test_a_picture_that_was_named_otherwise_tells_how_far(tmp_path):
    pixels = np.full((8, 8, 3), 100, np.uint8)
    before, after = Image.fromarray(pixels), Image.fromarray(pixels + np.uint8(2))
    record, picture = Made(before).record(), tmp_path / "blue.png"
    before.save(picture)
    assert differences(Made(before), record, picture) == ""
    assert f"target-1.png ({distance(after, before)})" in differences(Made(after), record, picture)
    assert f"{tmp_path / 'target-1.png'} cannot be read" in differences(Made(after), record, tmp_path / "run.json")
    after.save(picture)
    assert f"{picture} is not the record's" in differences(Made(after), record, picture)
