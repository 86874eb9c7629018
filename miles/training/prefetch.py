"""Reading ahead: a thread makes the next few items while the present one is used, and never more than so many."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def prefetch(make: Callable[[Given], Made], items: Iterable[Given], ahead: int) -> Generator[Made, None, None]:
    """make(item) of each item, in order, made in a thread; at most `ahead` of them wait here, the one being made included.

    An exception of make or items is raised where its item would have come, and ends the iteration. Closing the iterator (also by leaving it
    to the garbage collector) ends the thread; it waits for the item that is being made.
    """
    assert ahead >= 1, "at least the next one"
    places = threading.Semaphore(ahead)
    made: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    closed = False

    def work() -> None:
        try:
            for item in items:
                places.acquire()
                if closed:
                    return
                made.put(("item", make(item)))
            made.put(("end", None))
        except BaseException as error:
            made.put(("error", error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (got := made.get())[0] == "item":
            places.release()
            yield got[1]
        if got[0] == "error":
            raise got[1]
    finally:
        closed = True
        places.release()
        thread.join()
