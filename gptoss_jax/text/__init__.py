"""The tokenizer, harmony conversations and structured output."""
