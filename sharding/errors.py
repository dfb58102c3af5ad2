"""What a user can get wrong about a mesh, or about the processes that share one."""


class ShardingError(ValueError):
    """A mesh or rules that cannot be used: one line that names the axis, what was expected and what was found."""


class ClusterError(ShardingError):
    """Processes that cannot work together: one line that names the fact, the process and what was found."""
