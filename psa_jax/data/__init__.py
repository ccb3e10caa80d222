"""Preference data: SAGE on disk, the small world drawn here, shards and batches.

Importing it makes `sage` known to TFDS: `tfds.load("sage/sd1_512", data_dir=SHARDS)`.
"""

from psa_jax.data.builder import Sage as Sage  # TFDS finds a builder by its class having been defined
