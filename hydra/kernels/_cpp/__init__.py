"""Kernels in C++, compiled on first use by the compiler that torch.compile needs on a CPU anyway."""
