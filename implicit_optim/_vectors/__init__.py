"""Vectors ``[*batch, n]``: how a pytree lies in them, sums over them, masks over their tasks.

It uses torch alone.
"""

from implicit_optim._vectors.layout import Layout, keystr
from implicit_optim._vectors.masks import (
    is_free_to_read, is_readable, none_running, none_running_if_free, selector, where,
)  # fmt: skip
from implicit_optim._vectors.reductions import (
    directions, dot, largest, norm, power_of_two, products, unit,
)  # fmt: skip
