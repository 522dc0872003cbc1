"""Multi-head latent attention: keys and values of all heads from one small vector, which is all that a cache keeps."""
