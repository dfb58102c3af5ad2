"""Platform-dependent defaults of the engine's options."""

from __future__ import annotations

import dataclasses

DECODE_STEPS = 4
"""On an H100 the host needs 2 to 3 ms to launch a step and read back the previous one, and one sequence's step 2 ms."""

ACCELERATOR_CHUNK, CPU_CHUNK = 2048, 512
"""On an H100 a prompt token takes 28 us in a step of 512 tokens, which reads all experts for few, and 19 us in 2048."""


@dataclasses.dataclass(frozen=True)
class Pace:
    """The values of the engine options of the same names, and the bucket sizes of page tables.

    Page tables have `least_pages` times a power of `pages_factor` entries. Few sizes suffice if kernels read only the
    entries that they need; more are used if a step's time grows with the table, or the table must fit a small memory.
    """

    long_prefill_token_threshold: int
    max_num_batched_tokens: int
    num_decode_steps: int
    least_pages: int
    pages_factor: int

    @classmethod
    def of(
        cls,
        platform: str,
        long_prefill_token_threshold: int | None,
        max_num_batched_tokens: int | None,
        num_decode_steps: int | None,
    ) -> Pace:
        """The options that are set, and the platform's defaults for those that are None."""
        usual = CPU_CHUNK if platform == "cpu" else ACCELERATOR_CHUNK
        max_num_batched_tokens = max_num_batched_tokens or max(usual, long_prefill_token_threshold or 0)
        steps = num_decode_steps or (1 if platform == "cpu" else DECODE_STEPS)
        pages = {"gpu": (64, 64), "tpu": (16, 8)}.get(platform, (4, 4))
        return cls(
            min(long_prefill_token_threshold or usual, max_num_batched_tokens),
            max_num_batched_tokens,
            steps,
            *pages,
        )
