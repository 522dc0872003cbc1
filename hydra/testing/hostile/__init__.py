"""What means harm: secrets that want out, pages that want to run, files that want to be unpickled, a job of them."""
