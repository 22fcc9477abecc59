"""`python -m flextok.cli`, where the command is not installed."""

import sys

from flextok.cli import main

sys.exit(main())
