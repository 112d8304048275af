"""`python -m flashpo` is `flashpo`."""

import sys

from flashpo.cli import main

sys.exit(main())
