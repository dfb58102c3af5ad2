"""How attention heads are laid out so that they divide over any number of devices, exactly."""

from __future__ import annotations

import dataclasses

ZERO = -1
"""Stands for a head of zeros, which adds nothing: its output meets zeros in the projection that follows."""


@dataclasses.dataclass(frozen=True)
class HeadLayout:
    """Grouped-query heads over `degree` devices.

    Key/value heads beyond the degree are padded to a multiple of it; fewer than the degree are repeated, each copy
    serving a part of its group of query heads. `q_sources` and `kv_sources` name the original head, or ZERO, that
    stands in each new place; query head h still reads kv head h // (q heads / kv heads).
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
