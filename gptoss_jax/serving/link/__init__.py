"""Connects the process that owns the engine with the one that answers HTTP requests, over a local socket."""
