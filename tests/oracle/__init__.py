"""The memory plan against the libraries themselves: a training step of real model code on tensors without content."""
