"""Where arrays live: a mesh with a data axis, batches split along it, everything else on every device."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from psa_jax.errors import PSAError

DATA = "data"


def make_mesh(data: int = -1) -> Mesh:
    """A mesh of `data` devices; −1 takes all."""
    available = jax.devices()
    count = len(available) if data == -1 else data
    if not 1 <= count <= len(available):
        raise PSAError(f"mesh.data = {data}: there are {len(available)} devices")
    # Convolutions with sharded operands need Auto axes; jax.make_mesh makes Explicit ones by default.
    return jax.make_mesh((count,), (DATA,), axis_types=(AxisType.Auto,), devices=available[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))
