import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import gpu


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA A10", 86),
        ("NVIDIA L40", 89),
        ("NVIDIA H100 80GB HBM3", 90),
        ("NVIDIA B200", 100),
        ("A card that nobody knows", None),
    ],
)
def test_only_gpus_before_ada_do_not_convert_float8(kind: str, capability: int | None) -> None:
    device = AbstractDevice(device_kind=kind, num_cores=100, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        assert gpu.capability() == capability
        gpu.check_converts(jnp.bfloat16)
        if capability is not None and capability < gpu.FLOAT8_CAPABILITY:
            with pytest.raises(NotImplementedError, match="float8_e4m3fn"):
                gpu.check_converts(jnp.float8_e4m3fn)
        else:
            gpu.check_converts(jnp.float8_e4m3fn)
