"""The losses inside other packages' trainers: `__main__` runs all, `compare` one of them."""
