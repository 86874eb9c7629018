"""Addresses that servers bind to, IPv4 and IPv6."""

from __future__ import annotations

import ipaddress
import os
import socket


def bind_host(host: str) -> str:
    """The address that this process's servers bind to: as configured, or for `auto` the one that its supervisor found (MILES_HOST), else loopback."""
    return (os.environ.get("MILES_HOST") or "127.0.0.1") if host == "auto" else host


def family_of(host: str) -> socket.AddressFamily:
    """The kind of socket that binds to host."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def bound(host: str, port: int) -> socket.socket:
    """A TCP socket bound to host and port (0: any free one), not listening; others may bind to it with SO_REUSEADDR until one listens. Raises OSError."""
    sock = socket.socket(family_of(host), socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def url_of(host: str, port: int) -> str:
    """http://host:port, an IPv6 address in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def unbindable(host: str) -> str | None:
    """Why no server of this machine can listen on host; None when one can."""
    if not host:
        return "no address is given"
    try:
        with socket.socket(family_of(host), socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except OSError as error:
        return error.strerror or str(error)
    except (UnicodeError, ValueError):  # a label of more than 63 characters; NUL
        return "no name of a host"
    return None


def is_loopback(host: str) -> bool:
    """Whether nothing outside this machine can reach a server on host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
