"""HYDRA: a workspace for inventing and comparing language-model architectures."""
