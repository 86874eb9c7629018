"""A Hugging Face folder to a torch_dist checkpoint, without a model and without a GPU."""

from __future__ import annotations

from pathlib import Path

from miles.config.exits import UserError
from miles.convert.conversion import FOLDER, Conversion
from miles.convert.hf_source import HfSource
from miles.convert.options import Options
from miles.convert.progress import Progress
from miles.convert.report import Report
from miles.convert.torch_dist_source import TRACKER
from miles.convert.torch_dist_writer import write_tracker
from miles.convert.units import Rank, Units
from miles.models.maps.find import known_folder


def hf_to_torch_dist(source: str | Path, output: str | Path, options: Options | None = None, me: Rank | None = None, quiet: bool = True) -> Report:
    """Write OUTPUT/release and the tracker file from a Hugging Face folder. Collective over `me.world` processes.

    UserError, one line, for a source that is not whole or not understood and for a destination that holds something else; nothing then
    looks like a checkpoint. Running it again after an interruption goes on.
    """
    options, me = options or Options(), me or Rank()
    known, hf, root = known_folder(source), HfSource(source), Path(output)
    _check_empty(root)
    work = Conversion(known, hf, options)
    units = Units(root / FOLDER, work.fingerprint, work.names, work.write, lambda records: work.finish(root, records))
    progress = Progress(work.bytes, quiet or me.rank != 0)
    try:
        resumed = units.run(me, progress)
    finally:
        progress.end()
    if me.rank == 0 and not (root / TRACKER).is_file():
        write_tracker(root)
    return Report(str(root), len(work.shapes), work.bytes, len(work.names), resumed, work.warnings)


def _check_empty(root: Path) -> None:
    """UserError where the destination holds anything but a conversion, such as the checkpoints of a training run, whose tracker file would be lost."""
    tracker = root / TRACKER
    if tracker.is_file() and tracker.read_text(errors="replace").strip() != FOLDER:
        raise UserError(f"{tracker}: says {tracker.read_text(errors='replace').strip()[:40]!r}, so {root} holds another checkpoint; choose another folder")
    if root.is_dir() and any(entry.name != FOLDER and not entry.name.startswith(TRACKER) for entry in root.iterdir()):
        raise UserError(f"{root}: not empty, and no unfinished conversion of this source with these options; choose another folder")
