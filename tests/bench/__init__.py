"""What the operator costs and how fast it is, measured on the real cluster: `make bench`."""
