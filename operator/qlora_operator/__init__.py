"""The operator: decides what a QLoRAJob needs next, and does it."""
