"""Checks annotations as beartype does, at a fraction of its cost for functions rarely called or often defined."""

from collections.abc import Callable
from typing import Any

from beartype import beartype

_made: dict[tuple, Callable] = {}


def checked(function: Callable) -> Callable:
    """Returns the function as beartype wraps it, wrapped at its first call.

    jaxtyping writes an empty function with the parameters and one with the result of each `def` that runs, and
    beartype takes a millisecond for each. Most functions of the package are never called in one process, and inner
    functions are defined at every call of the outer one. The checks of an empty function depend on its signature
    alone, so one wrapper serves all with the same name and signature.
    """
    made = None

    def check(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        if made is None:
            made = _checked(function)
        return made(*args, **kwargs)

    return check


def _checked(function: Callable) -> Callable:
    code = function.__code__
    shape = code.co_code, code.co_varnames, code.co_posonlyargcount, code.co_argcount, code.co_kwonlyargcount
    optional = len(function.__defaults__ or ()), tuple(function.__kwdefaults__ or ())
    key = function.__module__, function.__qualname__, shape, optional, tuple(function.__annotations__.items())
    try:
        if key not in _made:
            _made[key] = beartype(function)
    except TypeError:  # annotations that cannot be keys
        return beartype(function)
    return _made[key]
