"""The process in which ``apart`` has checks made."""

from __future__ import annotations

import sys

from lunashm.cli.checks import apart

if __name__ == "__main__":
    apart.main(*sys.argv[1:])
