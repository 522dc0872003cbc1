"""Models. hydra.model.framework builds them."""
