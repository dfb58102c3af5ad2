"""Processes on several hosts that run one program together."""
