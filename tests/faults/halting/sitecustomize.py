"""Python imports this at its start from where PYTHONPATH has it: in trainer ranks it makes room for a halt inside of a phase."""

import sys

if sys.orig_argv[-2:] == ["-m", "miles.run.trainer"]:
    import halting

    halting.install()
