"""Meshes, logical axes, expert-parallel dispatch and multi-host start."""
