"""The engine's options."""

from __future__ import annotations

import dataclasses

from gptoss_jax.engine.memory import kv_dtype
from gptoss_jax.errors import UsageError, expect
from gptoss_jax.types import is_int, is_number
from pallas_kernels import backend_names, backend_platforms, current_platform

HARDWARE = {"cpu": "CPUs", "cuda": "NVIDIA GPUs", "rocm": "AMD GPUs", "tpu": "TPUs"}
"""Names of pallas_kernels' platforms for error messages."""


_COUNTS = (
    "max_num_seqs",
    "max_model_len",
    "page_size",
    "long_prefill_token_threshold",
    "max_num_batched_tokens",
    "num_decode_steps",
)


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Options of the engine, named as in vLLM where it has them. Raises UsageError, naming the invalid field.

    Args:
      max_num_seqs: maximum number of concurrent sequences, over the whole mesh.
      max_model_len: maximum length of a request, prompt and output, in tokens. None for the model's context length.
      page_size: tokens per page of the KV cache.
      kv_cache_memory: size of the KV cache on each device, in bytes.
      gpu_memory_utilization: fraction of the memory that JAX may allocate on each device for weights and KV cache
        together; the rest is for a step's temporaries. If neither this nor `kv_cache_memory` is set, the cache takes
        0.85 of the memory that the weights leave free.
      kv_cache_dtype: "bfloat16", "float32" or "float8"; None for the model's dtype.
      long_prefill_token_threshold: maximum number of prompt tokens of one sequence in a step. None for as many as a
        step has.
      max_num_batched_tokens: maximum number of tokens of a step, prompts and decodes of all sequences together, over
        the whole mesh. None for 2048 on accelerators and 512 on CPUs, or `long_prefill_token_threshold` if larger.
      enable_prefix_caching: whether prompts reuse the cached keys and values of earlier prompts with the same prefix.
      num_speculative_tokens: tokens drafted and verified per step and sequence; 0 disables speculative decoding.
      num_decode_steps: decode steps per launch of up to 4 sequences on each data-parallel rank when all decode and none
        waits (multi-step decode), so that the host keeps up with a fast device; this many tokens are then returned at a
        time. None for 2 on accelerators and 1 on CPUs.
      kernels: backend of the model's ops: "auto" for the platform's kernels, "reference" for plain JAX, or the name of
        a backend, which is used for the ops that have it.
    """

    max_num_seqs: int = 8
    max_model_len: int | None = None
    page_size: int = 32
    kv_cache_memory: int | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_dtype: str | None = None
    long_prefill_token_threshold: int | None = None
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    num_speculative_tokens: int = 0
    num_decode_steps: int | None = None
    kernels: str = "auto"

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value, default = getattr(self, name), getattr(EngineOptions, name)
            expect((value is default is None) or is_int(value, 1), name, "an integer from 1, below 2**31", value)
        self._check_memory()
        caching, drafts = self.enable_prefix_caching, self.num_speculative_tokens
        expect(isinstance(caching, bool), "enable_prefix_caching", "True or False", caching)
        expect(is_int(drafts, 0, 64), "num_speculative_tokens", "an integer from 0 to 64", drafts)
        expect(self.kernels in backend_names(), "kernels", ", ".join(backend_names()), self.kernels)
        platforms = backend_platforms(self.kernels)
        if platforms and (here := current_platform()) not in platforms:
            of = " and ".join(HARDWARE[platform] for platform in sorted(platforms))
            raise UsageError(f"{self.kernels} is for {of}, found the platform {here}", "kernels")

    def _check_memory(self) -> None:
        memory, share = self.kv_cache_memory, self.gpu_memory_utilization
        expect(memory is None or is_int(memory, 1, 2**63), "kv_cache_memory", "bytes from 1 to 2**63", memory)
        fine = share is None or (is_number(share, 0, 1) and share > 0)
        expect(fine, "gpu_memory_utilization", "a number above 0, at most 1", share)
        if memory is not None and share is not None:
            raise UsageError("expected this or kv_cache_memory, found both", "gpu_memory_utilization")
        if self.kv_cache_dtype is not None:
            kv_dtype(self.kv_cache_dtype)
