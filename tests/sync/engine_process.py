"""A real embedded engine in a process of its own: `python engine_process.py FOLDER TOKEN` prints its address and serves."""

import sys

from miles.engine.options import EngineOptions
from miles.engine.server import serve

if __name__ == "__main__":
    options = EngineOptions(
        folder=sys.argv[1], port=0, token=sys.argv[2], kv_cache_tokens=2048, max_running_requests=4, context_length=128, skip_tokenizer_init=True
    )
    serve(options, lambda url, _: print(url, flush=True))
