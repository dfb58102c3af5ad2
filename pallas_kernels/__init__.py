"""Ops with a plain-JAX reference as their meaning, and one file for each faster backend."""
