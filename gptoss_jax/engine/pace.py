"""How much is done at once on a platform."""

from __future__ import annotations

import dataclasses

DECODE_ROUNDS = 4
"""On an H100 the host needs 2 to 3 ms to start a step and read the one before, and one sequence's step takes 2."""

ACCELERATOR_CHUNK, CPU_CHUNK = 2048, 512
"""On an H100 a prompt's token takes 28 us in a step of 512, which reads all experts for few, and 19 in one of 2048."""


@dataclasses.dataclass(frozen=True)
class Pace:
    """What the engine's options of these names are when they are None, and how page tables grow.

    Sizes of page tables are `least_pages` times a power of `pages_factor`: few where kernels read the entries that they
    need, more where a step takes longer for the size alone, or has to keep the tables in a small memory.
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
        """As the options say, or as suits the platform."""
        usual = CPU_CHUNK if platform == "cpu" else ACCELERATOR_CHUNK
        max_num_batched_tokens = max_num_batched_tokens or max(usual, long_prefill_token_threshold or 0)
        rounds = num_decode_steps or (1 if platform == "cpu" else DECODE_ROUNDS)
        pages = {"gpu": (64, 64), "tpu": (16, 8)}.get(platform, (4, 4))
        return cls(
            min(long_prefill_token_threshold or usual, max_num_batched_tokens),
            max_num_batched_tokens,
            rounds,
            *pages,
        )
