"""Files to weights and back: Hugging Face, OpenAI and Orbax layouts."""
