"""The measurements of `python -m gptoss_jax.bench` and their reports."""
