"""Scenes of the embedded model: what is drawn, what is held out, and workers that draw ahead."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from fpe_pipeline.embedded.scenes import scenes
from fpe_pipeline.embedded.training.data import render_cache, start_rendering

SCENE = scenes.Scene("car", "red", "beach", seed=3)


class TestScenes:
    def test_equal_scenes_give_equal_bytes(self):
        first, second = scenes.render(SCENE), scenes.render(SCENE)
        assert np.array_equal(first.image, second.image)
        assert np.array_equal(first.mask, second.mask)

    def test_every_field_shows(self):
        drawn = scenes.render(SCENE).image
        other = {"object": "cat", "colour": "blue", "background": "snow", "x": 0.4, "y": 0.5, "scale": 0.9}
        for field, value in {**other, "angle": 10.0, "flip": True, "seed": 4}.items():
            assert not np.array_equal(scenes.render(replace(SCENE, **{field: value})).image, drawn), field

    @pytest.mark.parametrize("name", scenes.OBJECTS)
    def test_silhouette_is_antialiased_and_inside_the_picture(self, name):
        mask = scenes.render(replace(SCENE, object=name)).mask
        assert mask.min() == 0 and mask.max() == 255
        edge = (mask > 0) & (mask < 255)
        assert 0 < edge.sum() < (mask > 0).sum() / 2
        assert not mask[0].any() and not mask[-1].any() and not mask[:, 0].any() and not mask[:, -1].any()
        assert 0.05 < (mask > 127).mean() < 0.4

    @pytest.mark.parametrize("name", scenes.OBJECTS)
    def test_mask_is_where_the_colour_changes_the_picture(self, name):
        red, blue = (scenes.render(replace(SCENE, object=name, colour=c)) for c in ("red", "blue"))
        assert np.array_equal(red.mask, blue.mask)
        changed = (red.image != blue.image).any(axis=-1)
        assert not changed[red.mask == 0].any()
        assert changed[red.mask == 255].mean() > 0.4

    def test_size_is_free_and_too_small_is_refused(self):
        assert scenes.render(SCENE, 40).image.shape == (40, 40, 3)
        with pytest.raises(ValueError, match="at least 16"):
            scenes.render(SCENE, 8)

    def test_held_out_triples_leave_every_pair_in_training(self):
        seen = scenes.triples(held=False)
        assert len(scenes.triples(held=True)) == 32 and len(seen) == 288
        for first, second in ((0, 1), (0, 2), (1, 2)):
            pairs = {(t[first], t[second]) for t in scenes.triples()}
            assert {(t[first], t[second]) for t in seen} == pairs
        rng = np.random.default_rng(0)
        for _ in range(20):
            scene = scenes.sample_scene(rng, held=True)
            assert scenes.held_out(scene.object, scene.colour, scene.background)

    def test_captions_name_what_is_drawn(self):
        assert scenes.prompt("car", "red", "beach") == "a photo of a red car on the beach"
        assert scenes.prompt("fish", "orange", "snow") == "a photo of an orange fish in the snow"
        assert scenes.prompt("car", "red", "beach") in scenes.phrasings("car", "red", "beach")
        rng = np.random.default_rng(0)
        assert all("car" in scenes.caption(SCENE, rng) for _ in range(50))

    def test_cache_does_not_depend_on_its_length_and_refuses_other_settings(self, tmp_path):
        short = render_cache(tmp_path / "a", 3, 32, seed=5)
        long = render_cache(tmp_path / "b", 5, 32, seed=5)
        assert np.array_equal(short.images, long.images[:3])
        assert np.array_equal(render_cache(tmp_path / "a", 3, 32, seed=5).images, short.images)
        with pytest.raises(ValueError, match="choose another folder"):
            render_cache(tmp_path / "a", 3, 32, seed=6)

    @pytest.mark.slow
    def test_workers_draw_the_same_scenes_and_say_how_far_they_are(self, tmp_path):
        count = 300  # more than one process is started for
        alone = render_cache(tmp_path / "a", count, 16, seed=5)
        rendering = start_rendering(tmp_path / "b", count, 16, seed=5, workers=2)
        assert rendering.wait(10) >= 10
        assert rendering.wait() == count
        together = rendering.cache
        assert np.array_equal(alone.images, together.images) and np.array_equal(alone.masks, together.masks)
        assert alone.scenes == together.scenes
        assert json.loads((tmp_path / "b" / "settings.json").read_text())["count"] == count
        drawn = scenes.render(alone.scenes[7], 16)
        assert np.array_equal(alone.images[7], drawn.image)

    def test_a_worker_that_fails_is_told(self, tmp_path):
        rendering = start_rendering(tmp_path, 300, 8, workers=2)  # too small to draw
        with pytest.raises(RuntimeError, match="ended with status 1"):
            rendering.wait()

    @pytest.mark.parametrize("background", scenes.BACKGROUNDS)
    def test_what_stands_stands_on_the_ground(self, background):
        rng = np.random.default_rng(2)
        for name in ("car", "house", "boat", "mushroom", "cat"):
            scene = scenes.sample_scene(rng, triple=(name, "red", background))
            assert (scene.object, scene.colour, scene.background) == (name, "red", background)
            rows = np.flatnonzero(scenes.render(scene, 64).mask.max(axis=1) > 127)
            assert 0.7 < (rows[-1] + 1) / 64 < 0.95
