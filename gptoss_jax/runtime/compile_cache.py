"""The persistent compile cache, which lets later runs start without compiling."""

from __future__ import annotations

import os
from pathlib import Path


def enable_compile_cache() -> None:
    """Keep compiled programs in the user's cache directory, unless JAX_COMPILATION_CACHE_DIR names another.

    With several processes nothing is cached by default: their hosts' directories may differ, and a program must be
    compiled by all processes or by none.
    """
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or jax.config.jax_compilation_cache_dir:
        return
    if jax.distributed.is_initialized():
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "gptoss_jax" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
