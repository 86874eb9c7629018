"""Reinforcement-learning post-training of large language models, native to Slurm."""

__version__ = "0.1.0"
