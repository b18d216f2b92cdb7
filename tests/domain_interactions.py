"""Interactions of users with items of domains, drawn at random."""

import numpy as np
from hypothesis import strategies as st


@st.composite
def interactions(draw, max_rows=40):
    """Users [M], items [M], domains [M, G] distinct within a row, and the number of domains."""
    num_domains = draw(st.integers(1, 5))
    slots = draw(st.integers(1, 3))
    row = st.sets(st.integers(0, num_domains - 1), max_size=slots).map(
        lambda chosen: [*sorted(chosen), *[-1] * (slots - len(chosen))]
    )
    rows = draw(
        st.lists(
            st.tuples(st.integers(0, 6), st.integers(-4, 8), row), min_size=1, max_size=max_rows
        )
    )
    users, items, domains = zip(*rows, strict=True)
    return np.array(users), np.array(items), np.array(domains), num_domains
