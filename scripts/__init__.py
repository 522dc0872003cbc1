"""What a user starts: the config, the trainer, and the engine that papermill finds by its entry point."""

from importlib.util import find_spec

if find_spec("hydra.errors") is None:
    _found = find_spec("hydra")
    raise ImportError(
        "the package `hydra` must be HYDRA's own, but Python finds "
        f"{_found.origin if _found else 'none'}. Facebook's hydra-core has the same package name: "
        "uninstall it from this environment (pip uninstall hydra-core), or use the .venv that `make report` makes."
    )
