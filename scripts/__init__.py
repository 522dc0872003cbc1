"""What a user starts: the config, the trainer, and the engine that papermill finds by its entry point."""

import hydra

if not (hydra.__doc__ or "").startswith("HYDRA:"):
    raise ImportError(
        f"the package `hydra` must be HYDRA's own, but Python finds {hydra.__file__ or list(hydra.__path__)}. A folder "
        "of that name in the working directory hides it when it is not installed; and Facebook's hydra-core has the "
        "same package name: uninstall that (pip uninstall hydra-core), or use the .venv that `make report` makes"
    )
