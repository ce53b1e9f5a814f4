"""`python -m milo_latent`, and `accelerate launch -m milo_latent` for several processes."""

import sys

from milo_latent.cli import main

sys.exit(main())
