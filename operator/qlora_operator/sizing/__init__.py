"""Model shape × recipe → bytes, itemised. Pure."""
