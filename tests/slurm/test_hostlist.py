"""Names of nodes as Slurm itself expands them."""

from __future__ import annotations

import pytest

from miles.slurm.hostlist import expand
from miles.slurm.minicluster import Cluster

LISTS = ("train0", "train[0-3]", "train[0-1,7,09-11],login", "a[008-011]b[1-2]", "gb300-r[01-02]-n[1,3-4],cpu5,x[7]", "n[9-11],m-3.site.org")


def test_examples() -> None:
    assert expand("train[0-1,7,09-11],login") == ["train0", "train1", "train7", "train09", "train10", "train11", "login"]
    assert expand("r[1-2]n[3,5]") == ["r1n3", "r1n5", "r2n3", "r2n5"]


@pytest.mark.parametrize("text", LISTS)
def test_as_slurm_does(slurm: Cluster, text: str) -> None:
    assert expand(text) == slurm.run(["scontrol", "show", "hostnames", text]).stdout.split()
