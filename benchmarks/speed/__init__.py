"""How fast and how frugal the losses are, as fractions of what the hardware allows."""
