"""Addresses and ports of this machine, and whether another one answers."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable

from rwkv_accel.errors import UserError


def resolve(host: str) -> str:
    """IPv4 or IPv6 address of a host name.

    Raises:
        UserError: the name is unknown here.
    """
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except socket.gaierror:
        raise UserError(
            f"{socket.gethostname()} cannot resolve the main address {host!r}; give an IP address"
        ) from None


def is_own_address(address: str) -> bool:
    """Whether an interface of this machine carries the address."""
    with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return False
    return True


def own_addresses() -> dict[str, list[str]]:
    """Interface name -> its addresses, without the loopback."""
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    found = {
        name: [a.address for a in addresses if a.family in families and not a.address.startswith("fe80")]
        for name, addresses in psutil.net_if_addrs().items()
        if name != "lo"
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def route_to(address: str) -> tuple[str, str]:
    """(interface, own address) by which this machine reaches an address; the first are '?' without a route."""
    with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # UDP: looks the route up and sends nothing
        except OSError:
            return "?", "?"
        own = str(probe.getsockname()[0])
    for name, addresses in own_addresses().items():
        if own in addresses:
            return name, own
    return "lo", own


def check_can_host(host: str, port: int) -> None:
    """The main node's part: the main address is this machine's and the port is free.

    Raises:
        UserError: one of them is not so.
    """
    address = resolve(host)
    me = socket.gethostname()
    if not is_own_address(address):
        listed = ", ".join(a for addresses in own_addresses().values() for a in addresses) or "none"
        raise UserError(
            f"the main address {host} is not an address of {me}, which runs as node 0; "
            f"its addresses are: {listed}. Give one of them, or start node 0 on the machine that has {host}"
        )
    with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise UserError(
                f"port {port} of {me} cannot be taken ({error.strerror}); another run may use it: "
                "choose another main port, the same on all nodes"
            ) from None


def wait_until_reachable(host: str, port: int, seconds: float, say: Callable[[str], None]) -> None:
    """Block until the main node listens; a line after 30 seconds and every 30 seconds says what is being waited for.

    Raises:
        UserError: it did not within the time.
    """
    address, me = resolve(host), socket.gethostname()
    started, next_line, reason = time.monotonic(), 30.0, "no answer"
    while (waited := time.monotonic() - started) < seconds:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or "no answer"
        if waited >= next_line:
            next_line += 30
            say(f"{me} has been waiting {waited:.0f} s for node 0 at {host}:{port} ({reason})")
        time.sleep(0.5)
    raise UserError(
        f"{me} cannot reach node 0 at {host}:{port} ({reason}); check that node 0 was started, that {host} is its "
        f"address on a network that {me} shares, and that no firewall closes the port"
    )


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
