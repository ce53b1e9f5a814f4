"""`python -m milo_latent.cli`."""

import sys

from milo_latent.cli import main

sys.exit(main())
