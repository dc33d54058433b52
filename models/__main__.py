"""`python -m cellops.models`: the command `cellops`, for torchrun's -m."""

import sys

from cellops.models.cli import main

sys.exit(main())
