"""Anthropic's Messages API: POST /v1/messages, streamed or not, and POST /v1/messages/count_tokens.

What gpt-oss makes of the fields that it has no equal for:

* `thinking` and `output_config.effort` choose the reasoning effort, see `request.reasoning_effort`. The model always
  reasons. Its reasoning is answered as thinking blocks unless `thinking` is "disabled"; with the display "omitted" the
  blocks are empty, and their signatures carry the reasoning to the next request.
* `max_tokens` may exceed the context: the answer then ends with "model_context_window_exceeded".
* Thinking blocks are accepted with any signature, and redacted ones are left out, since they cannot be read.
* A tool's input is sent once it is complete. It is the model's text if that is a JSON object. An object with raw line
  breaks in its strings, or with text behind it, is repaired. Anything else becomes {}, as does an input that
  `max_tokens` cuts short: clients answer {} with the names of the missing parameters, on which the model calls again,
  while a part of an input could be run as if it were whole.
* Blocks that are not text, tools that Anthropic runs or defines, containers, MCP servers and regions are refused.
"""

from gptoss_jax.serving.api.messages.routes import routes

__all__ = ["routes"]
