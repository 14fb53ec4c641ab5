"""`python -m lehr` is the `lehr` command."""

import sys

from lehr.cli import main

sys.exit(main())
