"""Errors meant for the person who runs HYDRA: each says what must hold, what was got, and what to do."""


class HydraError(Exception):
    """A problem that the user can mend. Anything else that is raised is a bug of ours."""


class ConfigError(HydraError):
    """A parameter, option or combination of them that cannot be run as asked."""


class DataError(HydraError):
    """A corpus, tokenizer or shard that is missing, empty, changed or damaged."""


class CheckpointError(HydraError):
    """A checkpoint that is missing, damaged, or of another model."""


class RunError(HydraError):
    """A run directory that is owned by another process, holds another config, or ended in failure."""


class RunCutOffError(RunError):
    """A run whose trainer was ended from outside; the same command goes on with it."""


class DamagedFileError(RunError):
    """A file of a run that is not as it was written."""


class MemoryLimitError(HydraError):
    """A run that would take more memory than it may; raised before its first step."""


class NotFiniteError(HydraError):
    """A loss or gradient that is not finite; raised before the optimizer moves."""


class SpikeError(HydraError):
    """A loss or gradient far beyond what was usual, once more than the run may skip."""


class OutOfMemoryError(HydraError):
    """Memory that was refused although everything that may be made smaller is."""


class DiskFullError(HydraError):
    """A disk without room for what must be written."""


class QuantisationError(HydraError):
    """A model that loses more by coarser weights than was allowed."""


class ComparisonError(HydraError):
    """Results that cannot be compared as they are: a seed missing from an arm, a figure that is not finite."""
