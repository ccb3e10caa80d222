"""Personalized Safety Alignment for text-to-image diffusion in JAX.

    import psa_jax

    pipe = psa_jax.load("tiny", adapter="adapter.safetensors")
    picture = pipe.generate("a cat in the snow", profile={"age": 9, "gender": "female"}, seed=1)

What is listed in `__all__` is imported when it is first used: `import psa_jax` itself takes no time.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "pipeline",
    "load_adapter": "pipeline",
    "Pipeline": "pipeline",
    "table_of": "pipeline",
    "build": "notebook",
    "config": "notebook",
    "train": "notebook",
    "curves": "notebook",
    "PSAError": "errors",
    "UserProfile": "profiles.schema",
    "EmbeddingTable": "profiles.table",
}
"""Public name → the module of this package that has it."""
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(sorted(_PUBLIC))}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
