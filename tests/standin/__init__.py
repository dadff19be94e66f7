"""A stand-in for NVIDIA's driver, over memfd and mmap, for machines without a GPU.

The real cuda-bindings load it as ``libcuda.so.1`` by LD_LIBRARY_PATH, so it only ever runs in child processes:
``build.environment()`` starts one, ``process.Process`` talks to one, ``control`` is for use within one.

``nvml/`` is another one, for its management library.
"""
