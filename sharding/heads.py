"""Layouts of attention heads that divide evenly over any number of devices and give exact results."""

from __future__ import annotations

import dataclasses

ZERO = -1
"""The source of a padding head: its weights are zero, also in the output projection, so it adds nothing."""


@dataclasses.dataclass(frozen=True)
class HeadLayout:
    """The layout of grouped-query attention heads over `degree` devices.

    Key/value heads are padded to a multiple of the degree. If they are fewer than the degree, they are replicated,
    and each copy serves some of its group's query heads. `q_sources` and `kv_sources` give the original head, or ZERO,
    at each position of the layout. Query head h still reads kv head h // (q heads / kv heads).
    """

    q_sources: tuple[int, ...]
    kv_sources: tuple[int, ...]

    @classmethod
    def of(cls, num_q: int, num_kv: int, degree: int) -> HeadLayout:
        """The layout with the fewest heads."""
        group = num_q // num_kv
        copies = max(1, -(-degree // num_kv))
        share = -(-group // copies)
        kv = [head for head in range(num_kv) for _ in range(copies)]
        q = [
            head * group + place if place < group else ZERO
            for head in range(num_kv)
            for place in range(copies * share)
        ]
        padding = -len(kv) % degree
        return cls(tuple(q + [ZERO] * (padding * share)), tuple(kv + [ZERO] * padding))
