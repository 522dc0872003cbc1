"""One package per attention backend; hydra.attention.registry knows them by name."""
