"""Lightning attention: linear attention with a fixed decay for each head and layer, as in MiniMax-01."""
