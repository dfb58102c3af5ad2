"""What `python -m gptoss_jax.bench` measures, and how it is told."""
