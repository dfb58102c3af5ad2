"""Errors in a mesh, its rules, or the processes that share it."""


class ShardingError(ValueError):
    """An invalid mesh or invalid rules; the message is one line with the axis, what was expected and what was found."""


class ClusterError(ShardingError):
    """Processes that cannot work together; the message is one line with the reason, the process and what was found."""
