"""By which network interface this machine reaches another one."""

from __future__ import annotations

import socket

import psutil

from runner.errors import PreflightError

ANY_PORT = 9  # nothing is sent


def interface_to(address: str) -> str:
    """Return the name of the interface by which this machine reaches address, as its routes are now.

    Raises PreflightError, naming the address, if it has no route there.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, ANY_PORT))
            own = probe.getsockname()[0]
    except OSError as error:
        raise PreflightError(f"node {socket.gethostname()} has no route to {address} ({error.strerror})") from None
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.address.partition("%")[0] == own for item in addresses):
            return name
    raise PreflightError(f"node {socket.gethostname()} has no interface with {own}, by which it reaches {address}")


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach address."""
    return address in ("::1", "localhost") or address.startswith("127.")
