"""A private Slurm of several nodes on one machine, with fake GPUs: to try things out, and for the tests."""

from miles.slurm.minicluster.cluster import Cluster
from miles.slurm.minicluster.layout import DEFAULT, Layout, NodeGroup, Partition, Settings

__all__ = ["DEFAULT", "Cluster", "Layout", "NodeGroup", "Partition", "Settings"]
