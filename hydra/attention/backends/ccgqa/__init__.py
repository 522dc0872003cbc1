"""Compressed convolutional (grouped-query) attention, CCA and CCGQA (arXiv 2510.04476)."""
