"""What is timed, each a program of its own; those of peers run in the peers' environment and import no HYDRA."""
