"""`python -m dino_d2`: the command `dino-d2` where it is not on the PATH."""

import sys

from dino_d2_cli import main

sys.exit(main())
