"""NBD URIs as doc/uri.md of the specification describes them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ustack.nbd.uri import NbdUri


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbd://example.com/disk", NbdUri(host="example.com", export="disk")),
        ("nbd://example.com/", NbdUri(host="example.com")),
        ("nbd://example.com", NbdUri(host="example.com")),
        ("nbd://example.com//disk", NbdUri(host="example.com", export="/disk")),
        ("nbd://example.com/hello%20world", NbdUri(host="example.com", export="hello world")),
        ("nbd://example.com/a+b%2fc/%C3%A4", NbdUri(host="example.com", export="a+b/c/ä")),
        ("nbd:///disk", NbdUri(host="localhost", export="disk")),
        ("nbd://[2001:db8::1]:20/x", NbdUri(host="2001:db8::1", port=20, export="x")),
        ("nbd://[fe80::1%25tap0]/", NbdUri(host="fe80::1%tap0")),
        ("nbd://alice@10.0.0.1:1/", NbdUri(host="10.0.0.1", port=1, username="alice")),
        ("nbd+unix:///disk?socket=sock", NbdUri("nbd+unix", export="disk", socket="sock")),
        ("nbd+unix:///?socket=%00/abstract", NbdUri("nbd+unix", socket="\0/abstract")),
        ("nbd+unix:///?socket=/run/a+b", NbdUri("nbd+unix", socket="/run/a+b")),
        ("nbd://h/?x-experiment=1", NbdUri(host="h")),
        (
            "nbds://alice@h/x?tls-type=psk&tls-hostname=other&tls-verify-peer=0",
            NbdUri("nbds", "h", export="x", username="alice", tls_type="psk", tls_hostname="other", tls_verify_peer=False),
        ),
        ("nbds+unix:///?socket=/s&tls-type=x509", NbdUri("nbds+unix", socket="/s", tls_type="x509")),
    ],
)
def test_what_the_document_describes(text: str, expected: NbdUri) -> None:
    assert NbdUri.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("http://example.com/", "scheme is 'http'"),
        ("example.com", "scheme is ''"),
        ("nbd:example", "no //"),
        ("nbd://h/a b", "spaces"),
        ("nbd://h/#x", "fragment"),
        ("nbd://h:99999/", "[Pp]ort"),
        ("nbd://h:0/", "port 0"),
        ("nbd://[::1/", "IPv6"),
        ("nbd://h/?socket=/s", "nbd\\+unix"),
        ("nbd+unix:///x", "no socket"),
        ("nbd+unix:///?socket=", "no socket"),
        ("nbd+unix://disk?socket=/s", "names a host"),
        ("nbd://h/?colour=red", "unknown parameter 'colour'"),
        ("nbd+unix:///?socket=/s&socket=/t", "given twice"),
        ("nbd+unix:///?socket", "no value"),
        ("nbds://h/?tls-type=magic", "anon, x509, psk"),
        ("nbds://h/?tls-verify-peer=yes", "0 or 1"),
        ("nbd://h/%ff", "UTF-8"),
        ("nbd://h/a%00b", "no NUL"),
        ("nbd://h/" + "a" * 4097, "4096 bytes"),
    ],
)
def test_mistakes_are_named(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        NbdUri.parse(text)
    assert repr(text) in str(caught.value)


def test_tls_is_demanded_by_the_scheme_alone() -> None:
    assert NbdUri.parse("nbds://h/").tls
    assert NbdUri.parse("nbds+unix:///?socket=/s").tls
    assert not NbdUri.parse("nbd://h/?tls-type=x509").tls


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)


@given(NAMES, st.integers(1, 65535), st.none() | NAMES.filter(bool), st.none() | NAMES)
def test_a_uri_survives_the_way_into_text_and_back(export: str, port: int, socket: str | None, username: str | None) -> None:
    if socket is None:
        uri = NbdUri(host="fe80::1%be0", port=port, export=export, username=username)
    else:
        uri = NbdUri("nbd+unix", export=export, socket=socket, username=username, tls_hostname="x&y")
    assert NbdUri.parse(str(uri)) == uri


@given(st.text(max_size=60))
def test_any_other_text_is_a_value_error(rest: str) -> None:
    for scheme in ("nbd:", "nbd://", "nbd+unix:///?socket=", ""):
        with contextlib.suppress(ValueError):
            NbdUri.parse(scheme + rest)
