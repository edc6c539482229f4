"""``python -m vramplan`` is the command ``vramplan``."""

from vramplan.cli.app import main

main()
