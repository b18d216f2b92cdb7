"""Domain weights: how sparse each domain is, measured, and what its examples should weigh.

Stage one measures the sparsity ``s_d`` of every domain, stage two turns it into a weight and moves
a bounded average towards it (after arXiv 2510.04375; the form of the measures is this package's).
With ``N`` interactions of ``U`` users with ``I`` items, of which ``n_d``, by ``u_d`` users and with
item entropy ``H_d``, belong to domain ``d``:

    idf_d = log(N / n_d) / max_e log(N / n_e)
    users_d = 1 - u_d / U
    entropy_d = 1 - H_d / log I
    s_d = (alpha idf_d + beta users_d + gamma entropy_d) / (alpha + beta + gamma)     in [0, 1]
    w*_d = w_min + (w_max - w_min) s_d
    average <- m^(n/1024) average + (1 - m^(n/1024)) w*     for n rows      in [w_min, w_max]
    weights = average / (mean of `average` over all interactions seen)      in (0, w_max / w_min]
"""

from dwl_kernels.domains.ids import domains_from_multi_hot
from dwl_kernels.domains.weights import DomainWeights

__all__ = ["DomainWeights", "domains_from_multi_hot"]
