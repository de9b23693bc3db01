"""Find the address and the interface by which this host reaches the other ranks."""

from __future__ import annotations

import array
import fcntl
import ipaddress
import socket
import struct
import time

from belief_dist.distributed.errors import LaunchError

_SIOCGIFADDR = 0x8915
# Reserved for documentation (RFC 5737), so the route to it is the route to other networks.
_DOCUMENTATION = "192.0.2.1"


def address_towards(host: str) -> str:
    """Return the local address from which this host reaches another; nothing is sent.

    Raises:
        OSError: The name is unknown, or there is no route.
    """
    family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # UDP: this only selects the route
        address: str = probe.getsockname()[0]
    return address


def outward_address() -> str:
    """Return this host's address towards other networks, or the loopback's if there is no route."""
    try:
        return address_towards(_DOCUMENTATION)
    except OSError:
        return "127.0.0.1"


def listen_at(address: str, port: int) -> socket.socket | None:
    """Return a socket that listens at one address of this host, and not at all that it has.

    Args:
        address: Under which the other ranks look for it.
        port: 0 lets the system choose.

    Returns:
        None for a name, which other hosts may resolve differently; for an address that is not on an
        interface of this host (a router translates it); and for a port that is taken.
    """
    host = "127.0.0.1" if address == "localhost" else address
    try:
        version = ipaddress.ip_address(host.split("%")[0]).version
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        return socket.create_server((host, port), family=family, backlog=1024)
    except (ValueError, OSError):
        return None


def is_loopback(address: str) -> bool:
    """Return whether an address reaches this host only."""
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def interface_of(address: str) -> str | None:
    """Return the name of the interface with this address, or None if there is none."""
    wanted = ipaddress.ip_address(address.split("%")[0])
    if wanted.is_loopback:
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            if _ipv4_of(probe, name) == wanted:
                return name
    return _ipv6_interfaces().get(wanted)


def _ipv4_of(probe: socket.socket, name: str) -> ipaddress.IPv4Address | None:
    request = array.array("B", struct.pack("256s", name.encode()[:15]))
    try:
        fcntl.ioctl(probe, _SIOCGIFADDR, request)
    except OSError:
        return None  # down, or without an IPv4 address
    return ipaddress.IPv4Address(request.tobytes()[20:24])


def _ipv6_interfaces() -> dict[ipaddress.IPv4Address | ipaddress.IPv6Address, str]:
    try:
        with open("/proc/net/if_inet6") as file:
            rows = [line.split() for line in file]
    except OSError:
        return {}
    return {ipaddress.IPv6Address(bytes.fromhex(row[0])): row[-1] for row in rows}


def wait_for_name(host: str, source: str, patience: float = 30.0) -> None:
    """Wait until a host name resolves; that of a new container may take a while.

    Args:
        host: A name or an address.
        source: The environment variable it comes from, for the message.
        patience: Seconds to wait.

    Raises:
        LaunchError: The name still does not resolve.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{source} names {host!r}, which {socket.gethostname()} cannot resolve "
                    f"({error.strerror}): set MASTER_ADDR to an address of rank 0's host."
                ) from None
        time.sleep(0.5)
