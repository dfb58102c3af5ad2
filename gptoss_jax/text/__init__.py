"""Text to tokens and back: the tokenizer, harmony conversations, structured output."""
