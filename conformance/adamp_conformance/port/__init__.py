"""Carrying a training from one framework into another: what its models are made of, maps between them, checkpoints."""
