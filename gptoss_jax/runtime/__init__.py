"""Compilation settings: the persistent compile cache and XLA options."""
