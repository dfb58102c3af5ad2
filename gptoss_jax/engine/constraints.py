"""What structured output needs of the engine: a mask before each token, and word of the token that came."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from gptoss_jax.types import StructuredOutputsParams

Scope = Literal["text", "final", "final or call"]
"""Where a form applies: to all of a completion, or to harmony's final channel; with calls of tools instead, or not."""


class TokenConstraint(Protocol):
    """What a sequence's next token may be."""

    def fill(self, words: np.ndarray) -> None:
        """Set the bits of the tokens that may come next in uint32 words, which are all ones."""
        ...

    def accept(self, token: int) -> None:
        """Take note of the token that came."""
        ...


class ConstraintMaker(Protocol):
    """Makes the constraint of a completion. Raises UsageError for a form that cannot be used."""

    def __call__(self, form: StructuredOutputsParams, scope: Scope) -> TokenConstraint:
        """One constraint for one completion."""
        ...
