"""What `python -m torchcam` runs."""

import sys

from torchcam.cli import main

if __name__ == "__main__":
    sys.exit(main())
