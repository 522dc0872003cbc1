"""What a machine with a GPU can say about HYDRA's kernels: numerics, speed, training; see __main__."""
