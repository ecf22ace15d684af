"""The commands of `kubectl qlora`: a module each, which has `declare` (its arguments) and `run`."""
