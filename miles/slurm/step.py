"""What a component's process does first on its node, before anything heavy is imported: who it is, where it is, and its end.

`enter` is the payload of every step (submitit calls it); the function it calls is found by import name.
"""

from __future__ import annotations

import atexit
import importlib
import ipaddress
import json
import os
import signal
import socket
import sys
from typing import Any

from miles.config.exits import AGAIN, OK, WRONG, UserError

LOOPBACK = "127.0.0.1"


class Stopped(BaseException):
    """The executor wants this component gone. No Exception: nothing that was called may take it for a failure of its own."""


def _on_stop(signum: int, frame: Any) -> None:
    raise Stopped


def delayed(function: str, arguments: tuple[Any, ...]) -> Any:
    """The submission that submitit loads: `enter` with plain values. Pickled as a call of this, so that writing it needs no submitit."""
    from submitit.core.utils import DelayedSubmission

    return DelayedSubmission(enter, function, *arguments)


def enter(function: str, *arguments: Any) -> dict[str, Any]:
    """Call `function(*arguments)` as the component's process of this node; returns its outcome {code, role, rank, reason, …} and `node`.

    Sets MILES_NODE (from 0 within the component) and MILES_HOST (this node's address), and refuses a node of another architecture. SIGTERM
    and SIGUSR2 end it with code 75 until the function says otherwise. The process leaves with the outcome's code, so that srun sees a failure.
    """
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, _on_stop)
    component, node = os.environ.get("MILES_COMPONENT", "main"), int(os.environ["SLURM_PROCID"])
    outcome: dict[str, Any] = {"code": AGAIN, "role": component, "rank": node, "reason": f"component {component} was stopped"}
    try:
        check_architecture()
        os.environ["MILES_NODE"] = str(node)
        os.environ["MILES_HOST"] = own_address()
        module, _, name = function.rpartition(".")
        outcome = getattr(importlib.import_module(module), name)(*arguments)
    except Stopped:
        pass
    except UserError as error:
        outcome |= {"code": WRONG, "reason": str(error)}
    finally:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)  # the result is being written
    if outcome["code"] != OK:
        atexit.register(_leave, outcome["code"])
    return {"node": os.environ.get("SLURMD_NODENAME", socket.gethostname()), **outcome}  # it may name another node, which is to blame


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check_architecture() -> None:
    """Refuse a node whose processor isn't what the group said (MILES_ARCHITECTURE). Raises UserError."""
    wanted, here = os.environ.get("MILES_ARCHITECTURE"), os.uname().machine
    if wanted and here != wanted:
        node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        raise UserError(
            f"node {node} is {here}, but component {os.environ.get('MILES_COMPONENT', 'main')} is for {wanted}: "
            "choose nodes that fit (partition, constraint or gpu_type of its group), or change the group's architecture"
        )


def own_address() -> str:
    """An address of this node that the job's other nodes reach: Slurm's NodeAddr, since host names may not resolve.

    MILES_ADDRESSES holds the addresses of the job's nodes by name. Raises UserError when there is none.
    """
    known: dict[str, str] = json.loads(os.environ.get("MILES_ADDRESSES", "{}"))
    name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    here = resolved(known.get(name, name))
    if here is not None and ((name in known and is_literal(known[name])) or not ipaddress.ip_address(here).is_loopback):
        return here
    # Some hosts resolve their own name to loopback: ask which of our addresses leads to another node.
    others = [address for other, address in known.items() if other != name]
    for target in (*others[:4], os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "")):
        there = resolved(target)
        if there is None or ipaddress.ip_address(there).is_loopback:
            continue
        family = socket.AF_INET6 if ":" in there else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((there, 9))  # sends nothing
            return str(probe.getsockname()[0])
    raise UserError(f"node {name}: no address found that other nodes could reach; set cluster.host to one, or NodeAddr in slurm.conf")


def is_literal(address: str) -> bool:
    """Whether it is an IP address, not a name."""
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


def resolved(name: str) -> str | None:
    """The IP address of a name, None if it has none here."""
    if not name:
        return None
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None
