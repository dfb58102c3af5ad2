"""gpt-oss in JAX: MXFP4 from the file to the multiply, on any mesh of GPUs or TPUs."""
