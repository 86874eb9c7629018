"""What a supervisor makes of signals: a SIGTERM that only asks reaches the rollout service, a second one and SIGUSR2 end it."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from miles.run.component import Signals, Stopped, ask_to_stop


@pytest.fixture
def kept() -> Iterator[None]:
    """Handlers of this process as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("asks", "number"), [(False, signal.SIGTERM), (False, signal.SIGUSR2), (True, signal.SIGUSR2)])
def test_what_ends_it_at_once(kept: None, asks: bool, number: signal.Signals) -> None:
    Signals(asks)
    with pytest.raises(Stopped):
        signal.raise_signal(number)


def test_term_only_asks_where_it_is_told_so(kept: None, attempts) -> None:
    attempt = attempts()
    signals = Signals(asks=True)
    (attempt.run.attempt(attempt.epoch) / "token").write_text(attempt.token)
    (attempt.run.attempt(attempt.epoch) / "service.json").write_text(f'{{"url": "{attempt.url}"}}')
    pass_on = ask_to_stop(attempt.folder, attempt.epoch, signals)
    signal.raise_signal(signal.SIGTERM)
    pass_on()  # nobody is there yet
    attempt.start("service")
    assert attempt.status()["stop"] is False
    pass_on()
    assert attempt.status()["stop"] is True
    signal.raise_signal(signal.SIGTERM)  # Slurm may say it twice
    with pytest.raises(Stopped):
        signal.raise_signal(signal.SIGUSR2)
