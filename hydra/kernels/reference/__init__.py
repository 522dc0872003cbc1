"""The operators again, slowly and in plain torch: what the fast ones are compared with."""
