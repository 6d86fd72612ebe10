"""The page of the RFCs is what its tool would write."""

from __future__ import annotations

from tools import rfc_page


def test_the_page_is_what_the_tool_would_write() -> None:
    assert rfc_page.PAGE.read_text() == rfc_page.rendered(), "run tools/rfc_page.py"
