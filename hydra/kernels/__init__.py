"""Operators that are worth more than a line of torch: one file each, its slow truth in `reference/`."""
