"""`python -m toys …` is the command line over the toy table, for tests that need a process of their own."""

from __future__ import annotations

import sys

from gulliver.cli import main as cli
from gulliver.pipeline import steps
from toys import TABLE

steps.STEPS = TABLE
sys.exit(cli.main())
