"""Measurements: of kernels alone, and of whole steps."""
