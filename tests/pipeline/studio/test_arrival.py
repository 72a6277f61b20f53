"""A page has a visitor at whatever event comes first: a button may be pressed before the page says that it is there."""

import pytest

from fpe_pipeline.studio.visitors import Visitor

gr = pytest.importorskip("gradio")


def test_each_page_has_a_visitor_of_its_own_from_its_first_event_on(desk):
    from gradio.state_holder import SessionState

    from fpe_pipeline.studio.page import build

    page = build(desk)
    (state,) = (block for block in page.blocks.values() if isinstance(block, gr.State))
    first, second = SessionState(page), SessionState(page)
    visitors = [session[state._id] for session in (first, second, first)]
    assert all(isinstance(each, Visitor) for each in visitors)
    assert visitors[0] is visitors[2] is not visitors[1]
    assert visitors[0].folder != visitors[1].folder
