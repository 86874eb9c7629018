"""Pure functions of tensors: advantages, losses, KL, reductions, off-policy weights, metrics. No process group, no file."""
