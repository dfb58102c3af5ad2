import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.engine.packing import Packed

DTYPES = (np.int32, np.uint32, np.float32, np.bool_)


def arrays(seed: int, parts: int, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    made = []
    for shape, dtype in zip(shapes, DTYPES * len(shapes), strict=False):
        # Smaller than the bit patterns of NaNs.
        bits = rng.integers(0, 0x7F000000, (parts, *shape), np.int32)
        made.append(bits % 2 == 1 if dtype is np.bool_ else bits.view(dtype))
    return made


@given(
    st.integers(0, 2**32),
    st.integers(1, 3),
    st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=9),
)
def test_unpacking_is_bit_exact(seed: int, parts: int, shapes: list[tuple[int, ...]]) -> None:
    tree = {"all": arrays(seed, parts, shapes), "none": None}
    packed = Packed.of(tree)
    assert packed.words.shape == (parts, sum(x[0].size for x in tree["all"]))
    back = packed.unpack()
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for got, want in zip(back["all"], tree["all"], strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), want.view(np.uint8))


def test_only_trees_of_the_same_layout_share_a_program() -> None:
    traced = []

    @jax.jit
    def total(packed: Packed[list[np.ndarray]]) -> jax.Array:
        traced.append(packed.layout)
        return sum(x.sum() for x in packed.unpack())

    for values in ([1, 2], [3, 4]):
        assert total(Packed.of([np.array([[v]], np.int32) for v in values])) == sum(values)
    assert len(traced) == 1
    assert total(Packed.of([np.array([[1, 2]], np.int32)])) == 3
    assert len(traced) == 2
