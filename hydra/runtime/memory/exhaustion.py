"""Memory that is refused: how to know it, and what can be given back."""

import gc

from hydra.runtime.choices import give_back_freed_memory

CPU_REFUSAL = "can't allocate memory"  # of torch's allocator for the CPU, which raises a RuntimeError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory was refused, by a GPU's allocator, the CPU's or Python's own."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and CPU_REFUSAL in str(error)


def give_back_memory() -> None:
    """Give back what is held unused: objects in cycles, the CUDA allocator's cache, free blocks of the C library."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    give_back_freed_memory()
