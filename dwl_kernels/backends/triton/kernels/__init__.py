"""Device code. Importing a module of this package imports Triton."""
