"""Pictures in, stylised pictures out, with transfers overlapped with the work: see docs/streams.md.

    from sf_compile.pipeline import StylizePipeline
    for picture in StylizePipeline(model)(frames): ...

``pictures`` says what a picture on the host is, ``conversion`` how its bytes become a network's input and
the output bytes again, ``lanes`` has the buffers and the CUDA streams, ``lending`` says how results leave
without a copy, ``stream`` has the threads and the order of things, ``timeline`` what happened when.
"""

from sf_compile.pipeline.conversion import Convention
from sf_compile.pipeline.pictures import PictureError
from sf_compile.pipeline.stream import PictureStream
from sf_compile.pipeline.stylize import StylizePipeline
from sf_compile.pipeline.timeline import Span

__all__ = ["Convention", "PictureError", "PictureStream", "Span", "StylizePipeline"]
