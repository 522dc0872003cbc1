"""Memory of a run: what the host allows (host), what a step takes (tracker, compiled, allocator), a plan that fits."""

from hydra.runtime.memory.host import HostMemory, read_memory
from hydra.runtime.memory.plan import MemoryPlan, Prediction

__all__ = ["HostMemory", "MemoryPlan", "Prediction", "read_memory"]
