"""Addresses that servers bind to, IPv4 and IPv6."""

from __future__ import annotations

import ipaddress
import socket


def family_of(host: str) -> socket.AddressFamily:
    """The kind of socket that binds to host."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def url_of(host: str, port: int) -> str:
    """http://host:port, an IPv6 address in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether nothing outside this machine can reach a server on host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
