"""What the operator costs and how fast it is, most of it measured on the real cluster: `make bench`."""
