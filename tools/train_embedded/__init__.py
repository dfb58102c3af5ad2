"""Trains the small model in `gptoss_jax/embedded`: python -m tools.train_embedded --help."""
