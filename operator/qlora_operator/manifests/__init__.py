"""Plan → ConfigMaps, Jobs and claims, as plain dicts. Pure."""
