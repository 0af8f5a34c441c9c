"""`python -m dino_d2` is `dino-d2`, where scripts of packages are not on the PATH."""

import sys

from dino_d2_cli import main

sys.exit(main())
