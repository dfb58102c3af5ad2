"""Shared code of the commands: flags, files, signals and printing."""
