"""placeholder, replaced below"""

from papermill.engines import NBClientEngine


class HydraEngine(NBClientEngine):
    """Temporary."""
