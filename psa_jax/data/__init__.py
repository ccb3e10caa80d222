"""Preference data: SAGE on disk, shards and batches.

Importing it registers `sage` with TFDS: `tfds.load("sage/sd1_512", data_dir=SHARDS)`.
"""

from psa_jax.data.builder import Sage as Sage  # TFDS finds a builder by its class having been defined
