"""Modules that several parts share: rotary embedding, feed-forward networks. Norms are torch.nn.RMSNorm."""
