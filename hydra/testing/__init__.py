"""check_attention, for a class of your own; and what tests share: contract suites, tolerances, poison, tiny specs."""

from hydra.testing.card.check import AttentionCard, check_attention

__all__ = ["AttentionCard", "check_attention"]
