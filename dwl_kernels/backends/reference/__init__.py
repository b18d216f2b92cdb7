"""The specification: `formulas` has the losses, `rows` what a problem means, `solve` gradients.

Nothing of the package imports it but the registry.
"""
