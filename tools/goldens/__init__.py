"""Generates golden files from independent implementations, each in its own environment."""
