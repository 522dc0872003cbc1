"""Triton kernels and their registration with torch: the only files that import triton, loaded when first asked for.

Each `<op>.py` holds the kernels, the operators `hydra::<op>` made of them, the function that hydra/kernels/<op>.py
calls, and `aot_cases()`: every form in which the shipped configurations launch them.
"""
