"""Problems, their checks and what is linear in their rows. Imports no backend and no autograd."""
