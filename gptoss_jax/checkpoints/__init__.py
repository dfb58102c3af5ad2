"""Reads, writes and converts checkpoints in the layouts of Hugging Face, OpenAI and Orbax."""
