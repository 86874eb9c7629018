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


def url_of(host: str, port: int) -> str:
    """http://host:port, an IPv6 address in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether nothing outside this machine can reach a server on host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
