"""The pages of docs/reference that are made from the code say what the code says."""

from __future__ import annotations

import pytest

from tools import reference_pages
from ustack.drops import DropReason
from ustack.mib import Mib


@pytest.mark.parametrize("name", reference_pages.PAGES)
def test_the_page_is_what_the_tool_would_write(name: str) -> None:
    page = (reference_pages.REFERENCE / name).read_text()
    assert page == reference_pages.rendered(name), "run tools/reference_pages.py"


def test_every_reason_and_every_counter_has_a_docstring() -> None:
    assert reference_pages.attribute_docs(DropReason).keys() == {reason.name for reason in DropReason}
    assert reference_pages.attribute_docs(Mib).keys() == Mib().as_dict().keys()


def test_where_something_is_counted_is_found_in_the_source() -> None:
    assert reference_pages.files_that_drop("IP_CSUM") == ["net/ipv4.py"]
    assert reference_pages.files_that_count("UdpNoPorts") == ["transport/udp.py"]
    assert reference_pages.files_that_drop("NO_SUCH_REASON") == []
