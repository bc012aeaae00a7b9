"""``python -m longvid``."""

import sys

from longvid.cli.commands import main

sys.exit(main())
