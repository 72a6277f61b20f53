"""A run that is stopped stands still with what it holds, lets others use the model, and goes on from its step."""

import gc
import re
import threading
import weakref

import pytest
import torch

from fpe_pipeline.images.distance import pixel_hash
from fpe_pipeline.studio.requests import options_of
from fpe_pipeline.studio.watched import Cancelled, Stopped, Told, Watched, go_on, watch
from tests.pipeline.studio.conftest import last
from tests.support.tiny_cli import TARGET


def stopped(desk, visitor, told, after=1):
    """Read until a step, stop, and read until the run stands still; the step at which it does."""
    for each in told:
        if "<progress" in each.status and step_of(each) >= after:
            desk.stop(visitor)
            break
    end = last(told)
    assert end.stands_still and "stopped" in end.status and end.made is None
    return step_of(end)


def step_of(shown):
    return int(re.search(r"step (\d+) of", shown.status)[1])


def pictures(result):
    return [pixel_hash(image) for image in (result.run.source, *result.run.edited, *(result.run.uncontrolled or ()))]


@pytest.mark.slow
def test_it_goes_on_from_its_step_to_the_bit(desk, visitor, values):
    """A method that sums heat from step to step, which a run that began anew at this step would lack."""
    assert options_of("fpe-regional")[0].name == "word"
    asked = values(["car"], steps=12, method="fpe-regional", targets=TARGET, control=False, seed=3)
    whole = last(desk.generate(desk.arrive(), True, *asked)).made
    step = stopped(desk, visitor, desk.generate(visitor, True, *asked), after=3)
    other = last(desk.generate(desk.arrive(), True, *values(steps=2, control=False))).made
    assert other is not None, "a run that stands still keeps the model from others"
    told = list(desk.go_on(visitor, "generate"))
    assert step_of(told[0]) >= step >= 3, "it began anew"
    made = told[-1].made
    assert pictures(made) == pictures(whole)
    assert made.run.report.explain() == whole.run.report.explain()
    assert "nothing stands still" in last(desk.go_on(visitor, "generate")).status


@pytest.mark.slow
def test_threads_are_as_others_left_them(desk, visitor, values):
    before = torch.get_num_threads()
    stopped(desk, visitor, desk.generate(visitor, True, *values(steps=20, control=False, targets=TARGET)))
    assert torch.get_num_threads() == before and not torch.backends.cudnn.deterministic
    assert last(desk.go_on(visitor, "generate")).made is not None
    assert torch.get_num_threads() == before and not torch.backends.cudnn.deterministic


@pytest.mark.slow
def test_a_stopped_run_can_be_cancelled_and_is_replaced_by_the_next(desk, visitor, values):
    stopped(desk, visitor, desk.generate(visitor, True, *values(steps=200)))
    assert "nothing stands still" in last(desk.go_on(visitor, "grid")).status
    desk.cancel(visitor)
    assert "nothing stands still" in last(desk.go_on(visitor, "generate")).status
    stopped(desk, visitor, desk.generate(visitor, True, *values(steps=200)))
    assert last(desk.generate(visitor, True, *values())).made is not None
    assert visitor.results and len(visitor.results) == 1 and not running()


@pytest.mark.slow
def test_who_leaves_leaves_no_run_behind(desk, visitor, values):
    stopped(desk, visitor, desk.generate(visitor, True, *values(steps=200)))
    visitor.close()
    assert not running()


@pytest.mark.slow
def test_another_model_needs_the_room(desk, visitor, values):
    stopped(desk, visitor, desk.generate(visitor, True, *values(steps=200)))
    pipe = weakref.ref(desk.models._loaded[1].pipe.unet)
    with desk.models.use("embedded"):
        assert not running()
        gc.collect()
        assert pipe() is None, "two models in memory"
    assert "another model has taken the place" in last(desk.go_on(visitor, "generate")).status


@pytest.mark.slow
def test_a_photo_is_inverted_in_two_goes(desk, visitor, values, photo):
    desk.receive_photo(visitor, photo)
    stopped(desk, visitor, desk.invert(visitor, "direct", *values(steps=12)))
    assert last(desk.go_on(visitor, "invert")).made is visitor.inverted
    assert last(desk.edit(visitor, "direct", *values(steps=12))).made is not None


def running():
    for thread in threading.enumerate():
        if thread.name == "fpe-run":
            thread.join(5)
    return [thread for thread in threading.enumerate() if thread.name == "fpe-run"]


def test_time_that_it_stands_still_counts_for_nothing():
    watched, seen = Watched(), []

    def work(watched):
        for done in range(5):
            watched.tell("edit", done, 4)
            seen.append(done)
            if done == 1:
                watched.stop()
        return "made"

    *_, end = watch(work, watched)
    assert isinstance(end, Stopped) and end.at.done == 2 and seen == [0, 1]
    threading.Event().wait(0.3)
    *told, made = go_on(watched)
    assert made == "made" and seen == [0, 1, 2, 3, 4] and watched.seconds < 0.3
    assert all(each.left < 0.3 for each in told if isinstance(each, Told) and each.left is not None)


def test_cancelled_where_it_stands():
    watched = Watched()

    def work(watched):
        watched.stop()
        watched.tell("edit", 1, 4)

    assert isinstance(list(watch(work, watched))[-1], Stopped)
    watched.cancel()
    with pytest.raises(Cancelled):
        list(watched.follow())
