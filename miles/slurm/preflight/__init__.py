"""A short job on a run's groups of nodes that tests what the run will need of them. What runs on every node needs Python's standard library alone."""
