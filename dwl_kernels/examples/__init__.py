"""Complete scripts: ``python -m dwl_kernels.examples.two_tower`` and ``...sasrec``.

Both go from ratings to ten recommendations for a user, on a synthetic catalogue or on a data set
that is given by its folder: ``--data path/to/ml-1m``. `data` reads folders, `synthetic` makes one.
Under ``torchrun`` both train on several processes.
"""
