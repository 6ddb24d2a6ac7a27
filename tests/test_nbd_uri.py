"""URIs against doc/uri.md, and there and back again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.errors import NbdUnsupportedError, UsageError
from qmpnbd.nbd.policy import UriPolicy, admitted
from qmpnbd.nbd.tls import Tls
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
        ("nbd:", "HOST:PORT"),
        ("nbd:host", "HOST:PORT"),
        ("nbd::10809", "HOST:PORT"),
        ("nbd:host:port", "HOST:PORT"),
        ("nbd:host:0", "not a port"),
        ("nbd:::1:10809", "HOST"),
        ("nbd:unix:", "has a path"),
        ("nbd:unix:/s:exportname=a\0b", "NUL"),
        ("nbd:unix:a\0b", "NUL"),
        ("nbd:unix:" + "x" * 4097, "4097 bytes"),
        ("nbd:/disk?socket=s", "belongs to"),
        ("nbd:/disk", "HOST"),
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
        ("nbd://h/disk?tls-type=psk", "tls-type belongs to nbds"),
        ("nbds://h/disk?tls-type=none", "neither x509 nor psk"),
        ("nbds://h/disk?tls-verify-peer=no", "neither 0 nor 1"),
        ("nbds://h/disk?tls-priority=NORMAL", "'tls-priority' is not known"),
        ("nbds://me@h/disk?tls-type=psk&tls-username=you", "two user names"),
        ("nbds://h/disk?tls-certificates=/a&tls-psk-file=/b", "either certificates or a shared secret"),
        ("nbds://h/disk?tls-type=psk&tls-verify-peer=0", "always proves"),
        ("nbds://h/disk?tls-type=x509&tls-psk-file=/b", "no file of shared secrets"),
        ("nbds://h/disk?tls-hostname=a%00", "NUL"),
        ("nbds+unix:///disk?tls-hostname=a", r"\?socket=PATH"),
        ("nbds://h/x?tls-hostname=", "tls-hostname has no value"),
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


X509 = "tls-type=x509&tls-hostname=example.com&tls-verify-peer=0&tls-certificates=/etc/pki/x%20y"


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbds://h/x", NbdUri.tcp("h", export="x", tls=Tls())),
        ("NBDS+UNIX:///x?socket=s", NbdUri.unix("s", "x", Tls())),
        ("nbds+unix://me@/x?socket=s", NbdUri.unix("s", "x", Tls(username="me"))),
        (
            f"nbds+unix:///x?socket=s&{X509}",
            NbdUri.unix("s", "x", Tls("x509", "/etc/pki/x y", hostname="example.com", verify=False)),
        ),
        ("nbds://h?tls-verify-peer=1", NbdUri.tcp("h", tls=Tls(verify=True))),
        (
            "nbds://al%40ice@h:1/?tls-type=psk&tls-psk-file=/k",
            NbdUri.tcp("h", 1, tls=Tls("psk", psk_file="/k", username="al@ice")),
        ),
    ],
)
def test_what_a_uri_says_of_tls(text: str, uri: NbdUri) -> None:
    assert NbdUri.parse(text) == uri
    assert NbdUri.parse(str(uri)) == uri


def test_tls_that_proves_nothing_is_refused() -> None:
    with pytest.raises(NbdUnsupportedError, match="tls-verify-peer=0"):
        NbdUri.parse("nbds://h/x?tls-type=anon")
    with pytest.raises(UsageError, match="folder"):
        NbdUri.tcp("h", tls=Tls(ca_file="/ca.pem"))


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd:localhost:10809", NbdUri.tcp("localhost")),
        ("nbd:[::1]:10810:exportname=a b%20:c", NbdUri.tcp("::1", 10810, "a b%20:c")),
        ("nbd:unix:/run/nbd sock", NbdUri.unix("/run/nbd sock")),
        ("nbd:unix:/run/a%20:b:exportname=x:exportname=y", NbdUri.unix("/run/a%20:b", "x:exportname=y")),
        ("nbd:unix:s:exportname=", NbdUri.unix("s")),
        ("nbd+tcp://h/x", NbdUri.tcp("h", export="x")),
    ],
)
def test_what_qemu_understood_of_old(text: str, uri: NbdUri) -> None:
    assert NbdUri.parse(text) == uri
    assert NbdUri.parse(str(uri)) == uri


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


tls_parameters = st.builds(
    Tls,
    kind=st.sampled_from(["", "x509"]),
    certificates=names,
    hostname=names,
    verify=st.none() | st.booleans(),
) | st.builds(Tls, kind=st.sampled_from(["", "psk"]), psk_file=names.filter(bool), username=names, hostname=names)


@given(names, names.filter(bool), tls_parameters)
def test_a_tls_uri_there_and_back(export: str, path: str, tls: Tls) -> None:
    for uri in (NbdUri.unix(path, export, tls), NbdUri.tcp("h", 1, export, tls)):
        assert str(uri).isascii()
        assert NbdUri.parse(str(uri)) == uri


@given(st.text(max_size=60), st.sampled_from(["", "nbd:", "nbd://", "nbds+unix:///x?socket=s&", "nbd:unix:"]))
def test_any_text_is_a_uri_or_an_error(text: str, start: str) -> None:
    try:
        uri = NbdUri.parse(start + text)
    except (UsageError, NbdUnsupportedError):
        return
    assert NbdUri.parse(str(uri)) == uri


PLAIN, SECURE = NbdUri.tcp("h"), NbdUri.tcp("h", tls=Tls())
FILES = NbdUri.tcp("h", tls=Tls(certificates="/etc/pki"))
UNVERIFIED = NbdUri.tcp("h", tls=Tls(verify=False))
SOCKET = NbdUri.unix("s", tls=Tls())


@pytest.mark.parametrize(
    ("uri", "tls", "policy", "match"),
    [
        (PLAIN, None, UriPolicy(transports=frozenset({"unix"})), "may not use tcp"),
        (SOCKET, None, UriPolicy(transports=frozenset({"tcp"})), "may not use unix"),
        (PLAIN, None, UriPolicy(tls="require"), "TLS is required"),
        (SECURE, None, UriPolicy(tls="forbid"), "may not use TLS"),
        (FILES, None, None, "--tls-certificates DIR"),
        (NbdUri.tcp("h", tls=Tls(psk_file="/k")), None, None, "may not name files"),
        (UNVERIFIED, None, UriPolicy(unverified=False), "switch off"),
        (SOCKET, None, None, "tls-hostname"),
        (PLAIN, Tls(kind="psk"), None, "needs a file of secrets"),
        (
            NbdUri.tcp("h", tls=Tls(psk_file="/k")),
            Tls("x509"),
            UriPolicy(local_files=True),
            "no file of shared secrets",
        ),
    ],
)
def test_what_a_uri_may_not_do(uri: NbdUri, tls: Tls | None, policy: UriPolicy | None, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        admitted(str(uri), tls, policy)


@pytest.mark.parametrize(
    ("uri", "tls", "policy", "expected"),
    [
        (PLAIN, None, None, None),
        (PLAIN, Tls(), None, Tls(hostname="h")),
        (PLAIN, Tls(), UriPolicy(tls="require"), Tls(hostname="h")),
        (SECURE, None, UriPolicy(tls="require"), Tls(hostname="h")),
        (NbdUri.tcp("fe80::1%eth0", tls=Tls()), None, None, Tls(hostname="fe80::1")),
        (SOCKET, Tls(hostname="name"), None, Tls(hostname="name")),
        (SOCKET, Tls(verify=False), None, Tls(verify=False)),
        (UNVERIFIED, Tls(verify=True), None, Tls(verify=True, hostname="h")),
        (UNVERIFIED, None, None, Tls(verify=False, hostname="h")),
        (FILES, None, UriPolicy(local_files=True), Tls(certificates="/etc/pki", hostname="h")),
        (SECURE, Tls(ca_file="/ca", hostname="x"), None, Tls(ca_file="/ca", hostname="x")),
        (NbdUri.unix("s", tls=Tls(username="me")), Tls(psk_file="/k"), None, Tls(psk_file="/k", username="me")),
    ],
)
def test_what_becomes_of_a_uri(uri: NbdUri, tls: Tls | None, policy: UriPolicy | None, expected: Tls | None) -> None:
    assert admitted(str(uri), tls, policy) == (uri, expected)


@pytest.mark.parametrize(
    "parts",
    [
        {"kind": "anon"},
        {"certificates": "/d", "ca_file": "/f"},
        {"key_file": "/k"},
        {"psk_file": "/p", "ca_file": "/f"},
        {"psk_file": "/p", "verify": False},
        {"hostname": "a\0b"},
    ],
)
def test_parameters_of_tls_that_do_not_go_together(parts: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        Tls(**parts)  # type: ignore[arg-type]  # what a caller without a type checker would do
