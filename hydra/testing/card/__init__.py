"""What check_attention looks at, one group of properties in each file."""
