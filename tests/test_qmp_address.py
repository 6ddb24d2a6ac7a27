"""Monitor addresses as people write them."""

from __future__ import annotations

import pytest

from qmpnbd.errors import UsageError
from qmpnbd.qmp.address import FdAddress, MonitorAddress, TcpAddress, UnixAddress, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("/run/vm.qmp", UnixAddress("/run/vm.qmp")),
        ("vm.qmp", UnixAddress("vm.qmp")),
        ("unix:vm:1", UnixAddress("vm:1")),
        ("./vm:1", UnixAddress("./vm:1")),
        ("localhost:4444", TcpAddress("localhost", 4444)),
        ("tcp:127.0.0.1:4444", TcpAddress("127.0.0.1", 4444)),
        ("[::1]:4444", TcpAddress("::1", 4444)),
        ("fd:3", FdAddress(3)),
        ("./fd:3", UnixAddress("./fd:3")),
    ],
)
def test_addresses(text: str, address: MonitorAddress) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address or text == "unix:vm:1"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unix:",
        "tcp:",
        "host:",
        ":1",
        "host:0",
        "host:65536",
        "host:x",
        "host:¹",
        "fd:",
        "fd:-1",
        "fd:x",
        "fd:99999999999",
        "x" * 108,
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(text)
    assert caught.value.exit_code == 2
