"""What does not fit a mesh, and which values would."""


class ShardingError(ValueError):
    """Devices, mesh, rules or array sizes that do not go together."""
