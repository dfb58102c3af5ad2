"""OpenAI's Responses API."""

from gptoss_jax.serving.api.responses.routes import routes

__all__ = ["routes"]
