"""``python -m lunashm`` is ``lunashm``."""

from lunashm.cli import main

main()
