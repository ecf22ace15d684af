"""Nodes → GPU flavours → the choice, and why not the others. Pure."""
