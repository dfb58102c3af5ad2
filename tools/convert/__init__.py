"""Converts checkpoints between the layouts of Hugging Face, OpenAI and Orbax, every tensor byte for byte.

python -m tools.convert openai/gpt-oss-20b gpt-oss-20b-orbax --to orbax --verify
"""
