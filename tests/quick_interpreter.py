"""Lets Triton's interpreter make anew only what differs from one operation to the next.

It spells out the type of every result, shape and all, and looks dtypes up in a table that it builds
for each look. Kernels here know a few dozen types, so what follows from a type is kept.
"""

from __future__ import annotations

from typing import Any

import triton.language.core as tl
from triton.runtime import interpreter


def install() -> None:
    """For every launch of this process from now on."""
    look_up = interpreter._get_np_dtype
    make_block, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    found: dict[str, Any] = {}  # NumPy's dtype of each
    blocks: dict[Any, dict[str, Any]] = {}  # what such a type consists of
    shapes: dict[Any, tuple[Any, Any]] = {}  # of tensors, as the language's own objects

    def np_dtype(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in found:
            found[name] = look_up(kind)
        return found[name]

    def block(self: Any, element: Any, shape: Any) -> None:
        key = element.name, tuple([getattr(size, "value", size) for size in shape])
        known = blocks.get(key)
        if known is None:
            make_block(self, element, shape)
            blocks[key] = dict(self.__dict__)
        else:
            self.__dict__.update(known)

    def tensor(self: Any, handle: Any, kind: Any) -> None:
        shape = tuple(kind.shape) if kind.is_block() else ()
        known = shapes.get(shape)
        if known is None:
            make_tensor(self, handle, kind)
            shapes[shape] = self.numel, self.shape
        else:
            self.handle, self.type, self.dtype = handle, kind, kind.scalar
            self.numel, self.shape = known

    interpreter._get_np_dtype = np_dtype
    tl.block_type.__init__ = block
    tl.tensor.__init__ = tensor
