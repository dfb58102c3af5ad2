"""Weight specs, and the creators that need no checkpoint. One test runs this file as a script."""

import os
import re
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.gpt_oss import weight_specs
from gptoss_jax.model.placement import _preparation, partition_for
from gptoss_jax.model.weights import WeightSpec, abstract_creator, random_creator
from pallas_kernels import platform
from pallas_kernels.mxfp4_matmul import current_layout
from tests.checkpoints.files import CONFIG, assert_padded, padded, sharding_of
from tests.quick import QUICK


def test_the_stored_shape_must_fit_the_padded_shape() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        WeightSpec("w", (4, 4), (None, None), stored_shape=(4, 5))


@pytest.mark.parametrize("implementation", [pytest.param("threefry2x32", marks=pytest.mark.long), "rbg"])
def test_random_weights_depend_on_neither_sharding_nor_padding(implementation: str) -> None:
    """Runs in a separate process with eight devices."""
    result = subprocess.run(
        [sys.executable, __file__, implementation],
        env=os.environ
        | {"XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {QUICK}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "same" in result.stdout


def random_weights(implementation: str) -> None:
    key = jax.random.key(3, impl=implementation)
    whole = random_creator(key)
    for shape in ((4, 2), (2, 4)):
        mesh = Mesh(np.array(jax.devices()).reshape(shape), ("expert", "tensor"))
        place = sharding_of(mesh)
        sharded, abstract = random_creator(key, sharding=place), abstract_creator(sharding=place)
        for spec in [spec for spec in weight_specs(CONFIG) if re.search(r"layers\.0\.mlp|embed", spec.name)]:
            for wanted in {spec, padded(spec)}:
                # A key on one device would be copied to the others for each weight.
                with jax.transfer_guard_device_to_device("disallow_explicit"):
                    found = sharded(wanted)
                assert_padded(found, whole(spec))
                assert_padded(whole(wanted), whole(spec))
                leaves = zip(jax.tree.leaves(found), jax.tree.leaves(abstract(wanted)), strict=True)
                for array, declared in leaves:
                    assert (array.shape, array.dtype) == (declared.shape, declared.dtype)
                    assert array.sharding.is_equivalent_to(declared.sharding, array.ndim)
                    assert array.sharding.is_equivalent_to(place(wanted), array.ndim)
    print("same")


def test_programs_that_make_weights_run_in_order(jit_options: dict[str, Any]) -> None:
    """This includes small weights and single-device weights."""
    partition = partition_for(ModelConfig())
    with platform("cuda"):
        layout = current_layout()
        assert layout is not None
        creator = random_creator(jax.random.key(0, impl="rbg"))
        jit_options.clear()
        creator(WeightSpec("w", (8, 4), (None, None)))
        _preparation(partition, layout, 1, ("experts", "hidden", "expert_intermediate"))
    order = {"xla_gpu_enable_pdl": False}
    assert jit_options == {"_draw": order, "run": order}


if __name__ == "__main__":
    random_weights(sys.argv[1])
