"""A word with an attempt's rollout service."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit


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
