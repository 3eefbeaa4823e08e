"""What quickstart runs: the digits recipe."""
