"""Pictures in, stylised pictures out, with transfers overlapped with the work: see docs/streams.md.

    from sf_compile.pipeline import StylizePipeline
    for picture in StylizePipeline(model)(frames): ...

``pictures`` says what a picture on the host is, ``conversion`` how its bytes become a network's input and
the output bytes again, ``lanes`` has the buffers and the CUDA streams, ``lending`` says how results leave
without a copy, ``copier`` copies where one is needed. ``batches`` has what the two threads of a stream share:
``reader`` is the one that fills batches from the source, ``stream`` the order of things in the caller's, and
``results`` what it hands out. ``timeline`` says what happened when.
"""

from sf_compile.pipeline.conversion import Convention
from sf_compile.pipeline.pictures import PictureError
from sf_compile.pipeline.stream import PictureStream
from sf_compile.pipeline.stylize import StylizePipeline
from sf_compile.pipeline.timeline import Span

__all__ = ["Convention", "PictureError", "PictureStream", "Span", "StylizePipeline"]
