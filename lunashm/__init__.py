"""lunashm: many processes, one copy of a model's weights.

A host process loads a checkpoint once, freezes it and lends it; clients map the same bytes read-only.
Import :mod:`lunashm.client` to attach, run ``lunashm serve`` to host.
"""

__version__ = "0.1.0"
