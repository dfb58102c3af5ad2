"""What a user can get wrong about a mesh."""


class ShardingError(ValueError):
    """A mesh or rules that cannot be used: one line that names the axis, what was expected and what was found."""
