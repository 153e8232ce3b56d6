"""The way from a kernel's source to the GPU.

``compiler`` turns ``csrc/*.cu`` and compile-time constants into a cubin with NVRTC, ``cache`` keeps the
cubins on disk, ``loader`` loads them, ``launcher`` launches on the current stream. The other modules are the
host side of one op each: they pick a kernel and launch it. Importing any of them compiles nothing and touches
no GPU.
"""
