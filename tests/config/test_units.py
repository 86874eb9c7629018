from pathlib import Path

import pytest

from miles.config.compose import dump_config, load_config
from miles.config.exits import ConfigError
from miles.config.units import bytes_of


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1500", 1500), ("1500B", 1500), ("2k", 2000), ("2KB", 2000), ("2 KiB", 2048), ("200GB", 200_000_000_000), ("1.5TiB", 1_649_267_441_664), (" 3 M ", 3_000_000), ("1P", 10**15)],
)
def test_sizes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1,5GB", "200 cats", "1e9", "2iB", "5 mb"])
def test_what_is_no_size_is_said_in_one_line(text):
    with pytest.raises(ConfigError, match=r'retain_batches_bytes=.*: expected a number of bytes, or text such as 200GB or 1\.5TiB, got "') as caught:
        load_config([], [f"checkpoint.retain_batches_bytes='{text}'"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", ["200GB", "200000000000"])
def test_a_run_keeps_the_number(tmp_path: Path, given):
    config = load_config([], [f"checkpoint.retain_batches_bytes={given}", "checkpoint.retain_batches_days=2"])
    assert (config.checkpoint.retain_batches_bytes, config.checkpoint.retain_batches_days) == (200_000_000_000, 2.0)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert load_config([tmp_path / "run.yaml"]) == config


@pytest.mark.parametrize("setting", ["checkpoint.retain_batches_bytes=0", "checkpoint.retain_batches_bytes=0GB", "checkpoint.retain_batches_days=0", "checkpoint.retain_batches_bytes=true"])
def test_nothing_is_no_bound(setting):
    with pytest.raises(ConfigError, match="expected"):
        load_config([], [setting])
