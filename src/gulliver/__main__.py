"""`python -m gulliver` is the command `gulliver`."""

from __future__ import annotations

import sys

from gulliver.cli.main import main

sys.exit(main())
