"""``python -m anabranch`` is the command ``anabranch``; torchrun starts it so in each of its processes."""

import sys

from anabranch.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
