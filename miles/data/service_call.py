"""A word with an attempt's rollout service."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from miles.data.store.files import Damaged, read_json
from miles.data.store.run_dir import RunDir


def call(url: str, token: str, method: str, path: str, body: dict[str, Any] | None = None, seconds: float = 2.0) -> dict[str, Any] | None:
    """Its answer; None where it isn't there, is busy for so long [s], refuses, or is another program by now. Never through a proxy.

    By the standard library: httpx, which the roles use, takes a quarter of a second to import, while a run is being started.
    """
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=seconds)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        reply = connection.getresponse()
        content = reply.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    try:
        answer = json.loads(content) if reply.status == 200 else None
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def call_attempt(run: RunDir, attempt: Path, method: str, path: str, seconds: float = 2.0) -> dict[str, Any] | None:
    """call() of an attempt's service, whose address and token its folder has; None, too, where these are not there yet, not whole or another user's.

    Nobody asks in the name of a copied run: the address in it is the original's.
    """
    try:
        service, token = read_json(attempt / "service.json"), (attempt / "token").read_text().strip()
    except (FileNotFoundError, PermissionError, Damaged):
        return None
    if not isinstance(service, dict) or not isinstance(service.get("url"), str) or not run.is_at(service.get("run_dir", "")):
        return None
    return call(service["url"], token, method, path, seconds=seconds)
