"""`python -m jactus` is the command `jactus`."""

import sys

from .app.main import main

sys.exit(main())
