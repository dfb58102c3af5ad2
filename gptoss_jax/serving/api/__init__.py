"""OpenAI's and Anthropic's APIs over HTTP; needs the extra `serve`."""
