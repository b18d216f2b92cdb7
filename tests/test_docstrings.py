"""What ``help()`` of a public name shows: every argument with its shape, and what comes back."""

from __future__ import annotations

import inspect
import pydoc
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dwl_kernels

SHAPE = re.compile(r"``\[.*?\]``")
MODULES = ["CumulativeCrossEntropy", "DualScaleSampledSoftmax", "DynamicWeightedSampledSoftmax"]


def documented() -> Iterator[tuple[str, Callable[..., Any], str | None]]:
    """Public functions, classes and their methods, with the docstring that describes a call."""
    for name in dwl_kernels.__all__:
        public = getattr(dwl_kernels, name)
        yield name, public, public.__doc__
        if inspect.isclass(public):
            for method in methods(public):
                function = getattr(public, method)
                yield f"{name}.{method}", function, function.__doc__


def methods(public: type) -> list[str]:
    """What the package, and not PyTorch, defines for users of a class."""
    own = [base for base in public.__mro__ if base.__module__.startswith("dwl_kernels")]
    names = {name for base in own for name in vars(base) if not name.startswith("_")}
    names -= {"named_buffers"}  # PyTorch's, with what is counted
    return sorted(name for name in names if callable(getattr(public, name, None)))


def section(title: str, docstring: str | None) -> str:
    found = re.search(
        rf"^{title}:\n((?:    .*\n|\n)+)", inspect.cleandoc(docstring or "") + "\n", re.MULTILINE
    )
    return found[1] if found else ""


def entries(docstring: str | None) -> dict[str, str]:
    """The text of every argument; several may share one."""
    found = re.findall(
        r"^    (\w+(?:, \w+)*): (.*\n(?:     .*\n)*)", section("Args", docstring), re.MULTILINE
    )
    return {name: text for names, text in found for name in names.split(", ")}


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(function).parameters.values() if p.name != "self"]


CALLS = {name: (function, docstring) for name, function, docstring in documented()}


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_is_described_and_every_tensor_has_a_shape(name: str) -> None:
    function, docstring = CALLS[name]
    described = entries(docstring)
    assert described.keys() == {p.name for p in parameters(function)}
    tensors = [p.name for p in parameters(function) if "Tensor" in str(p.annotation)]
    assert [tensor for tensor in tensors if not SHAPE.search(described[tensor])] == []


@pytest.mark.parametrize("name", CALLS)
def test_returned_tensors_have_a_shape(name: str) -> None:
    function, docstring = CALLS[name]
    if not inspect.isclass(function) and "Tensor" in str(
        inspect.signature(function).return_annotation
    ):
        assert SHAPE.search(section("Returns", docstring))


@pytest.mark.parametrize("name", MODULES)
def test_help_of_a_module_leads_with_its_call(name: str) -> None:
    sentence, call, *_ = inspect.cleandoc(getattr(dwl_kernels, name).__doc__).split("\n\n")
    assert sentence.endswith(".")
    assert call.startswith("It is called")
    text = pydoc.plain(pydoc.render_doc(getattr(dwl_kernels, name)))
    assert text.index("loss = loss_fn(") < text.index("Args:")


@pytest.mark.parametrize("name", MODULES)
def test_help_of_a_module_shows_forward_and_hides_how_it_works(name: str) -> None:
    """`pydoc` shows names without an underscore, those of base classes too."""
    assert methods(getattr(dwl_kernels, name)) == ["extra_repr", "forward", "no_decay_parameters"]


def test_only_public_docstrings_carry_the_shapes_of_their_arguments() -> None:
    """A comment beside an argument would say the same for the second time."""
    for name, (function, _) in CALLS.items():
        if not inspect.isclass(function):
            source = inspect.getsource(function)
            signature = source[source.index("def ") : source.index('"""') if '"""' in source else 0]
            assert "#" not in signature, name
