"""Side-by-side pictures: what stands where, and that words are told apart."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fpe_pipeline.images import side_by_side as pictures
from fpe_pipeline.images.side_by_side import Comparison, side_by_side, upscale

SOURCE, TARGET = "a photo of a red car", "a photo of a blue car"


def image(colour, size=(64, 64), mode="RGB"):
    return Image.new("RGB", size, colour).convert(mode)


def row(source_prompt=SOURCE, target_prompt=TARGET, size=(64, 64)):
    return Comparison(source_prompt, target_prompt, image("red", size), image("blue", size), image("purple", size))


def count(picture, colour):
    return int((np.asarray(picture) == np.asarray(colour)).all(axis=-1).sum())


def boxes(picture, colour):
    """(left, top, width, height) of all pixels of a colour."""
    rows, columns = np.nonzero((np.asarray(picture) == np.asarray(colour)).all(axis=-1))
    return columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1


RED, BLUE, PURPLE, ORANGE = (255, 0, 0), (0, 0, 255), (128, 0, 128), (255, 165, 0)


class TestLayout:
    def test_source_then_target_without_control_then_edit(self):
        picture = side_by_side([row()])
        lefts = []
        for colour in (RED, PURPLE, BLUE):
            left, top, width, height = boxes(picture, colour)
            assert (width, height) == (256, 256)
            lefts.append((left, top))
        assert lefts == sorted(lefts)
        assert len({top for _, top in lefts}) == 1

    def test_a_photo_stands_beside_its_reconstruction(self):
        made = Comparison(SOURCE, TARGET, image("red"), image("blue"), image("purple"), image("orange"))
        picture = side_by_side([made], reconstruction_label="reconstruction, 30.0 dB")
        lefts = [boxes(picture, colour)[0] for colour in (RED, ORANGE, PURPLE, BLUE)]
        assert lefts == sorted(lefts) and len(set(lefts)) == 4
        assert picture.width - side_by_side([row()]).width == lefts[1] - lefts[0]

    def test_a_row_for_each_target(self):
        one, two = side_by_side([row()]), side_by_side([row(), row()])
        assert two.width == one.width
        assert count(two, BLUE) == 2 * count(one, BLUE) == 2 * 256 * 256
        assert boxes(two, BLUE)[3] > 2 * 256

    @pytest.mark.parametrize(
        ("size", "expected"), [((96, 48), (288, 144)), ((40, 64), (160, 256)), ((1024, 512), (512, 256))]
    )
    def test_aspect_ratio_and_scale(self, size, expected):
        assert boxes(side_by_side([row(size=size)]), BLUE)[2:] == expected

    def test_empty_columns_are_left_out(self):
        full = side_by_side([row()])
        without_control = side_by_side([Comparison(SOURCE, TARGET, image("red"), image("blue"))])
        only_edit = side_by_side([Comparison(SOURCE, TARGET, None, image("blue"))])
        assert full.width - without_control.width == without_control.width - only_edit.width == 256 + pictures.GAP
        assert count(only_edit, BLUE) == 256 * 256

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
    def test_any_mode(self, mode):
        picture = side_by_side([Comparison(SOURCE, TARGET, None, image("white", mode=mode))])
        assert picture.mode == "RGB"

    def test_same_input_same_pixels(self):
        assert side_by_side([row()]).tobytes() == side_by_side([row()]).tobytes()

    def test_nothing_to_show(self):
        with pytest.raises(ValueError, match="at least one row"):
            side_by_side([])


class TestWords:
    def texts(self, monkeypatch, comparison, **options):
        """(x, y, word, colour) of all that is written."""
        written = []
        draw = ImageDraw.ImageDraw.text

        def text(self, xy, text, fill=None, **kwargs):
            written.append((*xy, text, fill))
            return draw(self, xy, text, fill=fill, **kwargs)

        monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
        return side_by_side([comparison], **options), written

    def test_titles_and_prompts_are_written(self, monkeypatch):
        picture, written = self.texts(monkeypatch, row(), edit_label="target, my method")
        words = [word for _, _, word, _ in written]
        assert words == [
            *["source", "target,", "no", "control", "target,", "my", "method"],
            *SOURCE.split(),
            *TARGET.split(),
        ]
        assert count(picture, pictures.INK) > 100
        assert count(picture, pictures.MUTED) > 100

    def test_new_words_are_coloured(self, monkeypatch):
        picture, written = self.texts(monkeypatch, row())
        assert [word for _, _, word, colour in written if colour == pictures.ACCENT] == ["blue"]
        assert count(picture, pictures.ACCENT) > 10
        assert count(side_by_side([row(target_prompt=SOURCE)]), pictures.ACCENT) == 0

    def test_long_prompts_wrap_inside_their_columns(self, monkeypatch):
        long = "a photo of " + "very " * 60 + "x" * 300
        picture, written = self.texts(monkeypatch, row(long, long))
        font = pictures._font(pictures.FONT_SIZE)
        assert len({y for _, y, _, _ in written}) > 5
        for x, y, word, _ in written:
            assert x >= pictures.MARGIN - 1
            assert x + font.getlength(word) <= picture.width - pictures.MARGIN + 1
            assert y + pictures.FONT_SIZE <= picture.height - pictures.MARGIN / 2

    def test_long_titles_wrap_above_their_columns(self, monkeypatch):
        short, _ = self.texts(monkeypatch, row(), edit_label="target, edited")
        long, written = self.texts(monkeypatch, row(), edit_label="target, Prompt-to-Prompt with local blend")
        font = pictures._font(pictures.FONT_SIZE)
        title = [(x, y, word) for x, y, word, colour in written if colour == pictures.MUTED][4:]
        assert [word for _, _, word in title] == ["target,", "Prompt-to-Prompt", "with", "local", "blend"]
        left = boxes(long, BLUE)[0]
        assert all(left <= x and x + font.getlength(word) <= long.width - pictures.MARGIN for x, _, word in title)
        more = long.height - short.height
        assert more == len({y for _, y, _ in title}) * 21 - 21 > 0
        assert boxes(long, BLUE)[1] - boxes(short, BLUE)[1] == more  # and no title stands on a picture
        assert max(y for _, y, _ in title) + pictures.FONT_SIZE <= boxes(long, BLUE)[1]

    def test_words_of_any_script_and_none_at_all(self):
        side_by_side([row("", "海边 🚗 voilà")])


def test_upscale_keeps_pixels_that_fit():
    exact = image("red")
    assert upscale(exact, 64).tobytes() == exact.tobytes()
    assert upscale(image("red", (1, 300)), 30).size == (1, 30)
