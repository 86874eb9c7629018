"""Replies are tens of megabytes with routes: one that was used is gone, whatever its siblings wait for."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import weakref
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from miles.engine.client import EngineClient
from miles.engine.reply import LARGE_BYTES
from miles.rollout.engines import Engines

ROUTES = base64.b64encode(b"\1" * LARGE_BYTES).decode()


def test_a_reply_that_was_used_does_not_wait_for_its_siblings() -> None:
    last_may_answer = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if asked["sampling_params"][0]["sampling_seed"] == 1:
                assert last_may_answer.wait(30)
            content = json.dumps([{"text": "", "output_ids": [], "meta_info": {"routed_experts": ROUTES}}], separators=(",", ":")).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    async def body(url: str) -> None:
        async def find() -> list[EngineClient]:
            return [EngineClient(url)]

        engines = Engines(find, return_routed_experts=True)
        first, last = (asyncio.create_task(engines.generate(0, [1, 2], {"sampling_seed": seed})) for seed in (0, 1))
        reply = await first
        routes = reply["meta_info"]["routed_experts"]
        assert bytes(routes) == ROUTES.encode()
        whole = weakref.ref(routes.obj)
        del first, reply, routes
        await asyncio.sleep(0)  # the event loop lets go of what woke this task
        assert whole() is None
        assert not last.done()
        last_may_answer.set()
        assert bytes((await last)["meta_info"]["routed_experts"]) == ROUTES.encode()
        await engines.close()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        asyncio.run(body(f"http://127.0.0.1:{server.server_port}"))
    finally:
        last_may_answer.set()
        server.shutdown()
        server.server_close()
