"""URIs against doc/uri.md, and there and back again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.errors import NbdUnsupportedError, UsageError
from qmpnbd.nbd.uri import NbdUri


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd://example.com/disk", NbdUri.tcp("example.com", 10809, "disk")),
        ("nbd://example.com/", NbdUri.tcp("example.com")),
        ("nbd://example.com", NbdUri.tcp("example.com")),
        ("nbd://example.com//disk", NbdUri.tcp("example.com", export="/disk")),
        ("nbd://example.com/hello%20world", NbdUri.tcp("example.com", export="hello world")),
        ("nbd://example.com:10810/a/b", NbdUri.tcp("example.com", 10810, "a/b")),
        ("nbd://example.com:/x", NbdUri.tcp("example.com", export="x")),
        ("NBD://[::1]:10810/x", NbdUri.tcp("::1", 10810, "x")),
        ("nbd://[fe80::1%25eth0]/x", NbdUri.tcp("fe80::1%eth0", export="x")),
        ("nbd+unix:///disk?socket=/run/nbd.sock", NbdUri.unix("/run/nbd.sock", "disk")),
        ("nbd+unix:///disk?socket=nbd.sock", NbdUri.unix("nbd.sock", "disk")),
        ("nbd+unix:/disk?socket=s", NbdUri.unix("s", "disk")),
        ("nbd+unix://?socket=/a%20b%2bc+d", NbdUri.unix("/a b+c+d")),
        ("nbd+unix:///?socket=%00/abstract", NbdUri.unix("\0/abstract")),
        ("nbd+unix:///?socket=/%ff", NbdUri.unix("/\udcff")),
        ("nbd+unix:///%C3%BC%3F%23?socket=s", NbdUri.unix("s", "ü?#")),
    ],
)
def test_what_a_uri_means(text: str, uri: NbdUri) -> None:
    assert NbdUri.parse(text) == uri
    assert NbdUri.parse(str(uri)) == uri


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not an NBD URI"),
        ("/run/nbd.sock", "not an NBD URI"),
        ("nbd", "not an NBD URI"),
        ("http://example.com/", "begins with nbd"),
        ("nbd:unix:/run/s", "HOST"),
        ("nbd:///disk", "HOST"),
        ("nbd://:10809/disk", "HOST"),
        ("nbd://h:x/disk", "HOST"),
        ("nbd://h:0/disk", "not a port"),
        ("nbd://h:65536/disk", "not a port"),
        ("nbd://h:99999999999/disk", "HOST"),
        ("nbd://::1/disk", "HOST"),
        ("nbd://[::1/disk", "HOST"),
        ("nbd://[example.com]/disk", "IPv6"),
        ("nbd://[1:2]/disk", "IPv6"),
        ("nbd://a%3Ab/disk", "IPv6"),
        ("nbd://a%0Ab/disk", "not a host"),
        ("nbd://me@h/disk", "user name"),
        ("nbd://h/disk#part", "fragment"),
        ("nbd://h/a%00b", "NUL"),
        ("nbd://h/a%", "encodes nothing"),
        ("nbd://h/a%zz", "encodes nothing"),
        ("nbd://h/%ff", "not UTF-8"),
        ("nbd://h/a b", "percent-encoded"),
        ("nbd://h/a\nb", "percent-encoded"),
        ("nbd://h/ü", "percent-encoded"),
        ("nbd://h/" + "x" * 4097, "4097 bytes"),
        ("nbd://h/" + "x" * 20000, "too many"),
        ("nbd://h/disk?socket=/s", "belongs to"),
        ("nbd://h/disk?timeout=3", "'timeout' is not known"),
        ("nbd://h/disk?tls-type=psk", "'tls-type' is not known"),
        ("nbd+unix:///disk", r"\?socket=PATH"),
        ("nbd+unix:///disk?socket=", r"\?socket=PATH"),
        ("nbd+unix:///disk?socket=%00", "has a path"),
        ("nbd+unix:///disk?socket=/a%00b", "NUL"),
        ("nbd+unix:///disk?socket=a&socket=b", "twice"),
        ("nbd+unix:///disk?socket=a&x", "no value"),
        ("nbd+unix:///disk?socket=a&x=1", "'x' is not known"),
        ("nbd+unix://host/disk?socket=a", "no host"),
    ],
)
def test_what_is_not_understood_is_refused(text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        NbdUri.parse(text)


@pytest.mark.parametrize("text", ["nbds://h/x", "nbds+unix:///x?socket=s", "NBDS://h"])
def test_tls_is_recognised(text: str) -> None:
    with pytest.raises(NbdUnsupportedError, match="TLS is not supported yet"):
        NbdUri.parse(text)


@pytest.mark.parametrize(
    "parts",
    [
        {"transport": "unix", "path": "s", "host": "h"},
        {"transport": "unix"},
        {"transport": "tcp", "port": 1},
        {"transport": "tcp", "host": "h"},
        {"transport": "tcp", "host": "h", "port": 1, "path": "s"},
        {"transport": "tcp", "host": "h", "port": 1, "export": "\ud800"},
    ],
)
def test_parts_that_do_not_go_together_are_refused(parts: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        NbdUri(**parts)  # type: ignore[arg-type]  # what a caller without a type checker would do


names = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=40)


@given(names, names.filter(bool), st.booleans())
def test_a_unix_uri_there_and_back(export: str, path: str, abstract: bool) -> None:
    uri = NbdUri.unix("\0" + path if abstract else path, export)
    text = str(uri)
    assert text.isascii()
    assert text.isprintable()
    assert NbdUri.parse(text) == uri


@given(names, st.ip_addresses() | st.from_regex(r"[a-z0-9.-]{1,30}", fullmatch=True), st.integers(1, 65535))
def test_a_tcp_uri_there_and_back(export: str, host: object, port: int) -> None:
    uri = NbdUri.tcp(str(host), port, export)
    assert NbdUri.parse(str(uri)) == uri


@given(st.text(max_size=60) | st.from_regex(r"nbd(\+unix)?:[ -~]{0,60}", fullmatch=True))
def test_any_text_is_a_uri_or_a_usage_error(text: str) -> None:
    try:
        uri = NbdUri.parse(text)
    except (UsageError, NbdUnsupportedError):
        return
    assert NbdUri.parse(str(uri)) == uri
