import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpe_pipeline import BatchRoles


def roles(rows, guidance=True, **kwargs):
    return BatchRoles.from_batch(rows, classifier_free_guidance=guidance, **kwargs)


def test_two_prompts_with_guidance():
    batch = roles(4)
    assert batch.conditional == (False, False, True, True)
    assert (batch.sources, batch.targets) == ((2,), (3,))
    assert batch.source_of == (0, 0, 2, 2)
    assert batch.pairs() == ((2, 3),)
    assert batch.pairs(conditional=None) == ((0, 1), (2, 3))


def test_two_prompts_without_guidance():
    batch = roles(2, guidance=False)
    assert batch.conditional == (True, True)
    assert batch.pairs() == ((0, 1),)


def test_images_of_a_prompt_stand_together():
    batch = roles(12, images_per_prompt=2)
    assert (batch.sources, batch.targets) == ((6, 7), (8, 9, 10, 11))
    assert batch.pairs() == ((6, 8), (7, 9), (6, 10), (7, 11))


def test_several_sources():
    batch = roles(8, source_of=(0, 0, 2, 2))
    assert (batch.sources, batch.targets) == ((4, 6), (5, 7))
    assert batch.pairs() == ((4, 5), (6, 7))


def test_a_layout_of_its_own():
    plug_and_play = BatchRoles(conditional=(True, False, True), source_of=(0, 0, 0))
    assert plug_and_play.pairs(conditional=None) == ((0, 1), (0, 2))
    assert plug_and_play.pairs() == ((0, 2),)


@given(st.integers(2, 5), st.integers(1, 4), st.booleans())
def test_every_row_has_one_role(prompts, images, guidance):
    batch = roles(prompts * images * (1 + guidance), guidance, images_per_prompt=images)
    unconditional = batch.select(conditional=False)
    assert sorted((*unconditional, *batch.sources, *batch.targets)) == list(range(batch.rows))
    assert len(unconditional) == (prompts * images if guidance else 0)
    assert len(batch.sources) == images
    for source, target in batch.pairs():
        assert batch.conditional[source] and batch.conditional[target]
        # Image i of a target belongs to image i of its source.
        assert (target - source) % images == 0


@pytest.mark.parametrize(
    ("rows", "kwargs"),
    [(3, {}), (0, {}), (4, {"images_per_prompt": 3}), (5, {"guidance": False, "images_per_prompt": 2})],
)
def test_batches_that_do_not_divide_are_refused(rows, kwargs):
    with pytest.raises(ValueError, match=r"images_per_prompt=.*classifier_free_guidance="):
        roles(rows, **kwargs)


def test_impossible_roles_are_refused():
    with pytest.raises(ValueError, match="holds 2"):
        roles(4, source_of=(0, 0, 0))
    with pytest.raises(ValueError, match="must be its own source"):
        roles(6, source_of=(0, 0, 1))
    with pytest.raises(ValueError, match="names row 7"):
        BatchRoles(conditional=(True, True), source_of=(0, 7))
    with pytest.raises(ValueError, match="prompts 0 to 1"):
        roles(4, source_of=(0, 2))
    with pytest.raises(ValueError, match="images_per_prompt >= 1"):
        roles(4, images_per_prompt=0)
    with pytest.raises(ValueError, match="one source for each"):
        BatchRoles(conditional=(True,), source_of=())


@pytest.mark.parametrize("guidance", [True, False])
def test_a_batch_without_targets_has_nothing_to_edit(guidance):
    with pytest.raises(ValueError, match="holds no target"):
        roles(1 + guidance, guidance).pairs()
