"""How the tests' programs are compiled: they are small and run once or twice, so compiling takes most of the time."""

QUICK = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        # The new fusion emitters make faster code, but compiling with them takes two to three times as long.
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    )
)
"""XLA flags with which an engine step compiles in a third of the usual time."""

OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
"""Compiler options that undo QUICK except for the emitters, which no option restores; .ci/run tests with those, too."""
