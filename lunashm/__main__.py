"""``python -m lunashm`` is ``lunashm``."""

from lunashm.cli import main

if __name__ == "__main__":
    main()
