"""`python -m powertrain` is `powertrain`."""

import sys

from powertrain.cli import main

sys.exit(main())
