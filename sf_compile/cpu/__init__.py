"""The ops on a CPU: C++ kernels around oneDNN's convolutions, built at first use by a C++ compiler.

``building`` makes and finds the library, ``structures`` has its functions and the structs that they take,
``kernels`` calls these with tensors, ``convolution`` is ``conv2d``. ``forms`` says which convolutions need
fewer products, ``region`` runs several ops in a row.
Where there is no library, or for a tensor that it does not take, ``sf_compile.ops.reference`` runs.
"""
