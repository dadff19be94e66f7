"""Everything that only a GPU can tell, measured by one command: ``make gpu``, ``python -m bench.gpu``."""
