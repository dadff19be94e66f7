"""Hosts and clients on GPUs, end to end, on the stand-in driver: real processes, real sockets, real cuda-bindings."""
