"""Platform-dependent defaults of the engine's options, and the sizes that its programs are compiled for."""

from __future__ import annotations

import dataclasses
import itertools

DECODES = 64
"""The most sequences of a launch that only decodes, in one program instead of two."""

DECODE_SIZES = (1, 4, 16, 32, 64)

DECODE_STEPS, FEW = 2, 4
"""Its steps if the sequences are few, so that one step is shorter than the host's work; of more it has one.

On an H200 a step of one sequence takes 2 ms and of eight 5 ms, and the host needs 2 to 4 ms to launch a step and read
back the previous one. So two launches, which are in flight at a time, take about 10 ms.
"""

ACCELERATOR_TOKENS, CPU_TOKENS = 2048, 512
"""On an H100 a prompt token takes 28 us in a step of 512 tokens, which reads all experts for few, and 19 us in 2048."""

ROWS = 256
"""The most rows that a step samples, unless more sequences run; drafts take what sequences leave of them."""


@dataclasses.dataclass(frozen=True)
class Pace:
    """The values of the engine options of the same names, and the sizes of programs on each data-parallel rank.

    Args:
      token_sizes: tokens of a forward pass.
      row_sizes: sampled rows.
      decode_sizes: sequences of a launch that only decodes; see `steps`.
      plain: whether rows without top-k and top-p have programs of their own, which are faster.
    """

    long_prefill_token_threshold: int
    max_num_batched_tokens: int
    num_decode_steps: int
    token_sizes: tuple[int, ...]
    row_sizes: tuple[int, ...]
    decode_sizes: tuple[int, ...]
    plain: bool

    def steps(self, sequences: int) -> int:
        """The steps of a launch in which so many sequences decode."""
        return self.num_decode_steps if sequences <= FEW else 1

    @classmethod
    def of(
        cls,
        platform: str,
        long_prefill_token_threshold: int | None,
        max_num_batched_tokens: int | None,
        num_decode_steps: int | None,
        slots: int,
        drafts: int = 0,
        ranks: int = 1,
    ) -> Pace:
        """The options that are set, and the platform's defaults for those that are None."""
        on_cpu = platform == "cpu"
        usual = CPU_TOKENS if on_cpu else ACCELERATOR_TOKENS
        max_num_batched_tokens = max_num_batched_tokens or max(usual, long_prefill_token_threshold or 0)
        rows = max(slots, min(slots * (1 + drafts), ROWS))
        tokens = max(max_num_batched_tokens // ranks, rows)
        steps = 1 if drafts else num_decode_steps or (1 if on_cpu else DECODE_STEPS)
        return cls(
            min(long_prefill_token_threshold or tokens, tokens),
            max_num_batched_tokens,
            steps,
            _sizes(1, 8, 512, tokens) if on_cpu else _token_sizes(tokens),
            (rows,) if on_cpu else _row_sizes(rows),
            _up_to(min(DECODES, slots), DECODE_SIZES) if steps > 1 else (),
            not on_cpu,
        )


def _token_sizes(most: int) -> tuple[int, ...]:
    """Few sizes where a step is bound by the weights that it reads, then more; prompts are cut to fill them."""
    few = (1, 16, 64, 128, 256, 512, 1024, 1536)
    return _up_to(most, itertools.chain(few, (2048 << i for i in range(16))))


def _row_sizes(most: int) -> tuple[int, ...]:
    return _up_to(most, (16, 256))


def _sizes(least: int, factor: int, most: int, bound: int) -> tuple[int, ...]:
    """Sizes least, least * factor, ... up to `most`, and then multiples of it, up to `bound`, which is the last."""
    small = itertools.takewhile(lambda n: n < most, (least * factor**i for i in itertools.count()))
    return _up_to(bound, itertools.chain(small, itertools.count(most, most)))


def _up_to(most: int, sizes: itertools.chain[int] | tuple[int, ...]) -> tuple[int, ...]:
    return (*itertools.takewhile(lambda size: size < most, sizes), most)


def padded(count: int, sizes: tuple[int, ...]) -> int:
    """The smallest of the sizes that is at least the count."""
    return next(size for size in sizes if size >= count)
