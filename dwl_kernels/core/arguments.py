"""Single arguments as users hold them, and the sentence that says what is wrong with one.

Dense tensors pass as they are. Ids, counts and domains may also be NumPy arrays, pandas columns, or
whatever else gives a NumPy array, and where the function says so lists. Scalars are Python's or
NumPy's. Called by `checks`, `build`, the samplers, the domain weights and the modules.
"""

from __future__ import annotations

import numbers
import operator
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dwl_kernels.core.problem import INTEGERS

# ---------------------------------------------------------------- scalars


def integer(name: str, value: Any, wanted: str = "an integer", *, least: int | None = None) -> int:
    """`value` as an int, at least `least`."""
    if type(value) is not int:
        try:
            if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
                raise TypeError
            value = operator.index(value)
        except TypeError:
            raise wrong_type(name, value, wanted) from None
    if least is not None and value < least:
        raise ValueError(f"{name} is {value}; wanted at least {least}")
    return value


def ignored_id(value: Any) -> int:
    """`ignore_index` as an int that an id can be."""
    value = integer("ignore_index", value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"ignore_index is {value}; wanted an integer that int64 holds")
    return value


def number(name: str, value: Any, wanted: str = "a number") -> float:
    """`value` as a float."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong_type(name, value, wanted)
    return float(value)


def several_numbers(name: str, value: Any, wanted: str) -> tuple[float, ...]:
    """`value` as floats; how many they are is for the caller to look at."""
    if isinstance(value, (str, bytes, Mapping, set)) or not hasattr(value, "__iter__"):
        raise wrong_type(name, value, wanted)
    return tuple(number(f"{name}[{place}]", entry) for place, entry in enumerate(value))


def flag(name: str, value: Any) -> bool:
    """`value` as a bool. A string would be true whatever it says."""
    if not isinstance(value, (bool, np.bool_)):
        raise wrong_type(name, value, "True or False")
    return bool(value)


def wrong_type(name: str, value: object, wanted: str) -> TypeError:
    """The error for a value of a type that `name` cannot have."""
    if value is None:
        return TypeError(f"{name} is None; wanted {wanted}")
    got = reprlib.repr(value).replace("\n", " ")
    return TypeError(f"{name} is a {type(value).__name__}; wanted {wanted}, not {got}")


# ---------------------------------------------------------------- dense tensors


def check_dense(name: str, value: Any) -> None:
    """TypeError for what is no dense tensor, with a way to one that gives the right result."""
    # By type, so that importing the package does not import torch.distributed; the bases of a
    # Parameter torch.compile does not trace.
    plain = type(value) in (Tensor, Parameter)
    if not plain:
        if not isinstance(value, Tensor):
            raise TypeError(_not_a_tensor(name, value))
        if is_distributed(value):
            raise TypeError(f"{name} is a DTensor; {_whole_or_local(name, value)}")
    if value.is_nested:
        # The values of a tensor with gaps hold what is in the gaps too; its parts do not.
        packed = value.layout == torch.jagged and value.is_contiguous()
        mend = f"{name}.values()" if packed else f"torch.cat({name}.unbind())"
        raise TypeError(
            f"{name} is a nested tensor; pass the rows of all sequences as one dense tensor, "
            f"{mend}, and so for every argument that has an entry per row"
        )
    if value.layout != torch.strided:
        raise TypeError(
            f"{name} has layout {value.layout}; wanted a dense tensor: call .to_dense()"
        )
    if value.is_quantized:
        raise TypeError(f"{name} is quantised; call .dequantize() first")


def is_distributed(value: Any) -> bool:
    """Whether `value` is a DTensor."""
    plain = type(value) in (Tensor, Parameter)
    return not plain and any(kind.__name__ == "DTensor" for kind in type(value).__mro__)


def _not_a_tensor(name: str, value: object) -> str:
    if value is None:
        return f"{name} is None; wanted a torch.Tensor"
    mend = ""
    if isinstance(value, nn.Module):
        if isinstance(getattr(value, "weight", None), Tensor):
            mend = ": pass its .weight"
    elif hasattr(value, "__array__"):
        mend = f": torch.as_tensor(numpy.asarray({name})) makes one"
    return f"{name} is a {type(value).__name__}; wanted a torch.Tensor{mend}"


_ONE_FOR_ALL_ROWS = {"negative", "table", "bias", "domain_weights", "temperature"}
_ONE_PER_ROW = {
    *("query", "positive", "target", "domain_ids", "example_weights", "temperature"),
    *("ids", "positive_ids", "negative_ids", "log_q", "positive_log_q", "negative_log_q"),
}


def _whole_or_local(name: str, value: Any) -> str:
    """How a DTensor becomes what the loss of this rank needs, with the right gradient."""
    several = value.dim() > 0 and value.numel() > 1
    if name in _ONE_FOR_ALL_ROWS and not (name == "temperature" and several):
        # The local part would be some of the items, numbered anew. Every rank has the gradient of
        # its own rows' loss, or all have the same one: the mean over the ranks is what FSDP makes
        # of gradients, and right in both cases.
        each = '[Partial("avg")]'
        dims = getattr(getattr(value, "device_mesh", None), "ndim", 1)
        placements = each if dims == 1 else f"{each} * {dims}"
        return (
            f"pass all of it, {name}.full_tensor(grad_placements={placements}) with Partial of "
            "torch.distributed.tensor, which gives the ranks the mean of their gradients"
        )
    local = name in _ONE_PER_ROW and not (name.startswith("negative") and value.dim() == 1)
    rows = value.dim() - (name in ("query", "positive"))  # dimensions that tell rows apart
    for placement in getattr(value, "placements", ()):
        local &= placement.is_replicate() or (placement.is_shard() and placement.dim < rows)
    if local:
        return f"pass the rows of this rank, {name}.to_local()"
    return f"pass all of it, {name}.full_tensor()"


# ---------------------------------------------------------------- integers and numbers


def integers(
    name: str, value: Any, device: torch.device | None = None, *, lists: bool = False
) -> Tensor:
    """Ids or domains as int64 or int32; what is no tensor goes to `device`, or the default one.

    Raises:
        TypeError: anything but integers, or a list without `lists`.
        ValueError: rows of different lengths, or an integer that int64 does not hold.
    """
    if isinstance(value, Tensor):
        check_dense(name, value)
        if value.dtype not in INTEGERS:
            kind = "f" if value.is_floating_point() else "b" if value.dtype == torch.bool else ""
            raise _no_integers(name, value.dtype, kind, ".long()", "tensor")
        return value if value.dtype in (torch.int64, torch.int32) else value.long()
    array = _array(name, value, "integers", lists)
    if array.dtype.kind not in "iu" and array.size:
        if array.dtype.kind == "f" and bool(np.isnan(array).any()):
            raise TypeError(f"{name} has dtype {array.dtype} and holds NaN; wanted {_PRESENT}")
        raise _no_integers(name, array.dtype, array.dtype.kind, ".astype('int64')", "array")
    if array.dtype == np.uint64 and array.size and int(array.max()) >= 2**63:
        raise ValueError(
            f"{name} holds {int(array.max())}, which int64 does not; .astype('int64') takes 2**64 "
            "off such numbers, and they stay distinct"
        )
    return _tensor(array, np.int64, device)


def ids_on(device: torch.device, ids: Any) -> Tensor:
    """The argument `ids` of what lives on `device`, as int64."""
    ids = integers("ids", ids, device)
    if ids.device != device:
        raise ValueError(f"ids is on {ids.device}, wanted {device}; move one with .to(device)")
    return ids.long()


def real_numbers(name: str, value: Any) -> Tensor:
    """Counts or weights: a tensor in its dtype, what is no tensor as int64 or float64.

    Raises:
        TypeError: anything but integers or floats.
        ValueError: rows of different lengths.
    """
    if isinstance(value, Tensor):
        check_dense(name, value)
        if value.dtype not in INTEGERS and not value.is_floating_point():
            raise TypeError(f"{name} is {value.dtype}; wanted integers or floats")
        return value
    array = _array(name, value, "numbers", lists=True)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} is {array.dtype}; wanted integers or floats")
    return _tensor(array, np.float64 if array.dtype.kind == "f" else np.int64)


def flags_of(name: str, value: Any) -> Tensor:
    """Numbers that are all 0 or 1, or bools, as a tensor of bools.

    Raises:
        TypeError: what holds no numbers.
        ValueError: another number than 0 and 1, or rows of different lengths.
    """
    given: Any = value
    if isinstance(value, Tensor):
        check_dense(name, value)
    else:
        given = _array(name, value, "flags", lists=True)
        if given.dtype.kind not in "biuf":
            raise TypeError(f"{name} has dtype {given.dtype}; wanted flags of 0 and 1")
    on = given == 1
    other = ~(on | (given == 0))
    if bool(other.any()):
        raise ValueError(f"{name} holds {given[other][0].item():g}; wanted flags of 0 and 1")
    return torch.as_tensor(on)


def check_order(name: str, value: Any, of: str, mend: str) -> None:
    """ValueError for a pandas object whose entry k is not labelled k, as that of `of` k has to be.

    Its labels would be dropped, and every entry taken for that of another one.
    """
    index = getattr(value, "index", None)
    if index is None or callable(index):  # a list has a method of that name
        return
    labels = np.asarray(index)
    if labels.dtype.kind not in "iu" or not np.array_equal(labels, np.arange(len(labels))):
        raise ValueError(
            f"{name} has an index that is not 0, 1, 2 and so on, and entry k has to be that of "
            f"{of} k; pass {mend}"
        )


_PRESENT = (
    "integers, none of them missing: leave such rows out, or fill in -1 where it means none, then "
    ".astype('int64')"
)


def _no_integers(name: str, dtype: object, kind: str, cast: str, whole: str) -> TypeError:
    """The error for a tensor or an array (`whole`) of another kind of numbers."""
    if "domain" in name and kind in ("b", "f"):
        mend = f": {cast} makes them of whole numbers, domains_from_multi_hot of flags of 0 and 1"
    elif kind == "b":
        mend = f": where {name} is a mask, its .nonzero() makes an integer {whole}"
    elif kind == "f":
        mend = f": where {name} is whole numbers, {cast} makes an integer {whole}"
    else:
        mend = ""
    return TypeError(f"{name} has dtype {dtype}; wanted integers such as int64{mend}")


def _array(name: str, value: Any, wanted: str, lists: bool) -> np.ndarray[Any, Any]:
    """`value` as a NumPy array, of any dtype but objects and strings."""
    of_lists = isinstance(value, (list, tuple, range))
    kind = type(value).__name__
    if of_lists and not lists:
        raise TypeError(
            f"{name} is a {kind}; wanted a torch.Tensor or an array of {wanted}: "
            f"torch.tensor({name}) makes an integer tensor"
        )
    if isinstance(value, Mapping):
        none = -1 if wanted == "integers" else 0
        raise TypeError(
            f"{name} is a {kind}; wanted an array of {wanted}, whose entry k is that of k: "
            f"[{name}.get(k, {none}) for k in range(n)]"
        )
    if not (of_lists or hasattr(value, "__array__")):
        more = ", an array or a list" if lists else " or an array"
        raise wrong_type(name, value, f"a torch.Tensor{more} of {wanted}")
    if np.ma.is_masked(value):
        raise TypeError(f"{name} has masked entries; wanted {_PRESENT}")
    try:
        array = np.asarray(value)
        if array.dtype == object:  # as pandas holds what can be missing, or rows as lists
            array = np.asarray(array.tolist())
    except ValueError:
        raise ValueError(
            f"{name} has rows of different lengths; wanted a full array: fill shorter rows up, "
            "with -1 where it means none"
        ) from None
    except (TypeError, RuntimeError) as error:  # of a list of tensors that are on a GPU, say
        raise TypeError(f"{name} does not become an array of {wanted}: {error}") from None
    if array.dtype.kind in "USTO":
        others = [entry for entry in array.ravel().tolist() if not isinstance(entry, int)]
        if not others:
            raise ValueError(f"{name} holds integers that int64 does not; wanted smaller ones")
        got = reprlib.repr(others[0])
        if not isinstance(others[0], (str, bytes)):
            raise TypeError(f"{name} holds {got}; wanted {_PRESENT}")
        mend = ""
        if all(entry.isdigit() for entry in others):
            mend = f", as numpy.asarray({name}).astype('int64') makes of them"
        elif wanted == "integers":
            mend = f", as numpy.unique({name}, return_inverse=True)[1] numbers them"
        raise TypeError(f"{name} holds strings such as {got}; wanted {wanted}{mend}")
    return array


def _tensor(array: np.ndarray[Any, Any], dtype: Any, device: torch.device | None = None) -> Tensor:
    """A tensor of what may be read-only, reversed, or in the byte order of another machine."""
    return torch.as_tensor(np.require(array, dtype, ["C", "W"]), device=device)
