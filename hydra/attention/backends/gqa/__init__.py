"""Grouped-query attention; multi-head with n_kv_heads == n_heads, multi-query with n_kv_heads == 1."""
