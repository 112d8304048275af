"""`python -m flashpo` does the same as `flashpo`."""

import sys

from flashpo.cli import main

sys.exit(main())
