"""`python -m psa_jax COMMAND` is `psa-jax COMMAND`."""

import sys

from psa_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
