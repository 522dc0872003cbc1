"""Modules that several parts share: rotary embedding, feed-forward networks, norms."""
