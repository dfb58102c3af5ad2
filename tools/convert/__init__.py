"""Checkpoints in and out: Hugging Face, OpenAI, Orbax."""
