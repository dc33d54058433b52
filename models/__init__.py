"""Models, training and tools on top of the ops of `cellops`."""
