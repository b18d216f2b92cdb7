"""The losses inside other packages' trainers, a script for each: what a user would copy.

``python -m dwl_kernels.examples.clients.NAME`` runs one, where its client is installed. The lines
between ``# swap`` and ``# end`` are those that the swap changes. ``make clients`` compares each
with the loss that it takes the place of.
"""
