"""OpenAI's Responses API."""

from gptoss_jax.serving.api.responses.fields import CreateRequest
from gptoss_jax.serving.api.responses.routes import routes

__all__ = ["CreateRequest", "routes"]
