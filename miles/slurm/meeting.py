"""Where the processes of one attempt meet: the address of its rollout service, and the token that its callers carry."""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from miles.config.address import bind_host, bound, url_of
from miles.config.exits import UserError
from miles.config.schema import Cluster
from miles.data.store.files import seal_json


@dataclass(frozen=True)
class Meeting:
    """An address and its token."""

    url: str
    token: str


def hold_port(host: str, wanted: int) -> socket.socket:
    """A socket bound to a free TCP port of host: the wanted one, or any for 0. While it is open the kernel gives that port to nobody of its own
    accord, be it a server or a connection; who asks for it by number and with SO_REUSEADDR, as our service does, can listen there."""
    try:
        return bound(host, wanted)
    except OSError as error:
        raise UserError(f"cluster.port: {host}:{wanted} can't be used ({error.strerror}); choose another, or 0 for a free one") from error


def open_meeting(folder: Path, host: str, port: int) -> Meeting:
    """Write an attempt's token and service.json; the token first, since who finds the address asks with it."""
    token = secrets.token_hex(24)  # no "-" in front, which would make it an option on a command line
    handle = os.open(folder / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(token)
    url = url_of(host, port)
    seal_json(folder / "service.json", {"url": url, "host": host, "port": port, "run_dir": str(folder.absolute().parents[1])})
    return Meeting(url, token)


def own_address(cluster: Cluster) -> tuple[str, int, socket.socket]:
    """(host, port) that this machine's rollout service can have, and what holds the port for it. UserError when a port of the user's is taken."""
    host = bind_host(cluster.host)
    holder = hold_port(host, cluster.port)
    return host, int(holder.getsockname()[1]), holder
