"""``python -m sf_compile``: the command ``styleforge``, where its script is not on the path."""

import sys

from sf_compile.cli import main

sys.exit(main())
