"""How an attention is looked at from outside: by hydra.testing, and before a run trains a class of one's own."""
