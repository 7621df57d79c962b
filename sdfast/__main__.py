"""``python -m sdfast``."""

import sys

from sdfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
