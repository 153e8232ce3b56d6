"""Suite ``pipeline``: pictures a second from host to host, beside the network alone and beside plain loops.

    compute                     the network by our backend, call after call, its input on the device
    pipeline                    ``StylizePipeline`` over uint8 arrays on the host, results let go of in turn
    loop                        for each picture: upload, convert, the same network, convert, download
    loop-inductor-max-autotune  that loop with the network by Inductor

Each gets its turn in every round, which begins with pictures that are not timed; a row has the rate over all
rounds by the wall clock, from asking for the first picture to having the last, and that of the slowest and of
the fastest round. Before anything is timed the pipeline's and our loop's pictures are compared, and the
networks' outputs with a float64 run.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch._dynamo
from torch import Tensor

from sf_compile.bench.checks import check_output, check_sizes, relative_error
from sf_compile.bench.peers import PEERS, Network
from sf_compile.bench.rows import (
    BenchmarkError,
    Keep,
    Log,
    Row,
    dtype_name,
    environment_of,
    forget,
    replacing,
    rounded,
)
from sf_compile.bench.subject import SEED, Subject
from sf_compile.bench.timing import Budget, Consume, interleaved_rounds, synchronize
from sf_compile.bench.work import Size, parse_sizes
from sf_compile.pipeline import Convention, StylizePipeline, timeline

GPU_SIZES = parse_sizes("1080x1920")
CPU_SIZES = parse_sizes("64x64")
_PICTURES = 16  # that a source rotates over: at 1920x1080 more than a processor's cache
_INPUTS = 4
_DRAWN = 12  # pictures of the timeline that is drawn
_INDUCTOR = "loop-inductor-max-autotune"
_BACKENDS = {"compute": "styleforge", "pipeline": "styleforge", "loop": "styleforge",
             _INDUCTOR: "inductor-max-autotune"}  # fmt: skip


class _Runner(NamedTuple):
    """A peer, and how far from float64 its network is."""

    name: str
    consume: Consume
    error: float


def select_peers(names: Sequence[str] | None, device: torch.device, log: Log) -> list[str]:
    """Return the peers called `names`; for None all that can run on `device`.

    Raises:
        BenchmarkError: a name is unknown, or a named peer cannot run here.
    """
    chosen = list(dict.fromkeys(names or _BACKENDS))
    for name in list(chosen):
        if name not in _BACKENDS:
            raise BenchmarkError(f"no peer is called {name!r}; choose from {', '.join(_BACKENDS)}")
        if (reason := PEERS[_BACKENDS[name]].missing(device)) is not None:
            if names is not None:
                raise BenchmarkError(f"peer {name} cannot run on {device}: {reason}")
            log(f"without {name}: {reason}")
            chosen.remove(name)
    return chosen


def run_pipeline(
    sizes: Sequence[Size],
    dtypes: Sequence[torch.dtype],
    peers: Sequence[str],
    device: torch.device,
    *,
    budget: Budget,
    draw: Path | None = None,
    log: Log,
    keep: Keep = forget,
) -> list[Row]:
    """Check and time `peers` on `device`; one row each for every size and dtype.

    Args:
        sizes: pictures, and how many of them go through the network at once.
        dtypes: of the network.
        peers: names, in the order of the rows.
        device: a CUDA device or the CPU.
        budget: how long to measure each.
        draw: a PNG file for the timeline of the first size and dtype; None for none.
        log: receives one line of progress at a time.
        keep: receives all rows so far whenever a size and dtype is done.

    Raises:
        BenchmarkError: a picture is too small for the network, or a result is wrong.
    """
    check_sizes(sizes)
    if draw is not None and importlib.util.find_spec("matplotlib") is None:
        raise BenchmarkError('--plot needs matplotlib: pip install "sf_compile[demo]"')
    environment = vars(environment_of(device))
    subject = Subject.random()
    rows: list[Row] = []
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), on_device, torch._dynamo.config.patch(recompile_limit=64):
        for size in sizes:
            for dtype in dtypes:
                where = f"{size} {dtype_name(dtype)}"
                log(f"{where}: building {len(peers)} peers")
                case = _Case(subject, size, dtype, device, where)
                runners = [case.runner(name) for name in peers]
                rates = interleaved_rounds(
                    {runner.name: runner.consume for runner in runners}, size.batch, budget, device
                )
                common = {**environment, **subject.row(), **size._asdict(), "dtype": dtype_name(dtype)}
                del common["checkpoint"]
                rows += _rows(runners, rates, common)
                keep(rows)
                if draw is not None and len(rows) == len(runners):
                    case.draw(draw)
                    log(f"{where}: timeline in {draw}")
                del case, runners
                torch._dynamo.reset()
    return rows


class _Case:
    """One size and dtype: the network, by each backend that is asked for, and pictures."""

    def __init__(
        self, subject: Subject, size: Size, dtype: torch.dtype, device: torch.device, where: str
    ) -> None:
        self._size = size
        self._where = where
        self._model = copy.deepcopy(subject.model).to(device, dtype)
        self._convention = Convention.of(self._model, side_multiple=1, min_side=1)
        generator = np.random.default_rng(SEED)
        self._pictures = [
            generator.integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)
            for _ in range(max(_PICTURES, size.batch))
        ]
        self._inputs = [self._on_device(batch) for batch in itertools.islice(self._batches(), _INPUTS)]
        # A picture at a time, to bound the memory.
        exact = copy.deepcopy(self._model).double()
        self._reference = torch.cat([exact(one.double()) for one in self._inputs[0].split(1)])
        self._eager_error = relative_error(self._model(self._inputs[0]), self._reference)
        self._networks: dict[str, tuple[Network, float]] = {}

    def runner(self, name: str) -> _Runner:
        """A peer, whose result was compared."""
        network, error = self._network(_BACKENDS[name])
        if name == "compute":
            inputs = itertools.cycle(self._inputs)
            return _Runner(name, lambda count: self._compute(network, inputs, count), error)
        if name != "pipeline":
            batches, layout = self._batches(), self._layout(_BACKENDS[name])
            return _Runner(name, lambda count: self._loop(network, batches, count, layout), error)
        pipeline = StylizePipeline(network, batch_size=self._size.batch, **vars(self._convention))
        self._compare(network, pipeline)
        return _Runner(name, lambda count: self._stream(pipeline, count), error)

    def draw(self, path: Path) -> None:
        """Draw what a stream does once it runs."""
        network, _ = self._network("styleforge")
        pipeline = StylizePipeline(
            network, batch_size=self._size.batch, timeline=True, **vars(self._convention)
        )
        self._stream(pipeline, 4 * self._size.batch)
        with pipeline(self._source(2 * _DRAWN * self._size.batch)) as stream:
            for _ in stream:
                pass
            spans = [span for span in stream.timeline if span.picture >= _DRAWN * self._size.batch]
        title = f"{self._where}, {pipeline.convention.device}"
        with replacing(path) as temporary:
            timeline.plot(temporary, spans, title)

    def _network(self, backend: str) -> tuple[Network, float]:
        if backend not in self._networks:
            peer, layout = PEERS[backend], self._layout(backend)
            # Not in inference mode: weights made there have no version, and are packed anew in every call.
            model = copy.deepcopy(self._model).to(memory_format=layout)  # type: ignore[call-overload]
            network = peer.build(model)
            with torch.inference_mode():
                x = self._inputs[0].contiguous(memory_format=layout)
                for _ in range(3):
                    output = network(x)
                error = check_output(
                    peer.row_name, output, self._reference, self._eager_error, self._where
                )
            self._networks[backend] = network, error
        return self._networks[backend]

    def _layout(self, backend: str) -> torch.memory_format:
        last = PEERS[backend].layout(self._convention.dtype) == "channels_last"
        return torch.channels_last if last else torch.contiguous_format

    def _source(self, count: int) -> Iterator[np.ndarray]:
        return itertools.islice(itertools.cycle(self._pictures), count)

    def _batches(self) -> Iterator[np.ndarray]:
        """Batches as a plain loop gets them: stacked."""
        pictures = itertools.cycle(self._pictures)
        while True:
            batch = [next(pictures) for _ in range(self._size.batch)]
            yield batch[0][None] if len(batch) == 1 else np.stack(batch)

    def _on_device(self, batch: np.ndarray, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        x = torch.from_numpy(batch).to(self._convention.device)
        return x.permute(0, 3, 1, 2).to(self._convention.dtype).contiguous(memory_format=layout)

    def _compute(self, network: Network, inputs: Iterator[Tensor], count: int) -> None:
        with torch.inference_mode():
            for _ in range(count // self._size.batch):
                network(next(inputs))
        synchronize(self._convention.device)

    def _loop(
        self, network: Network, batches: Iterator[np.ndarray], count: int, layout: torch.memory_format
    ) -> list[np.ndarray]:
        """Do `count` pictures; return the last batch's."""
        results: list[np.ndarray] = []
        with torch.inference_mode():
            for _ in range(count // self._size.batch):
                y = network(self._on_device(next(batches), layout))
                pixels = y.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
                results = list(pixels.contiguous().cpu().numpy())
        return results

    def _stream(self, pipeline: StylizePipeline, count: int) -> None:
        with pipeline(self._source(count)) as stream:
            for _ in stream:
                pass

    def _compare(self, network: Network, pipeline: StylizePipeline) -> None:
        count = self._size.batch
        expected = self._loop(network, self._batches(), count, torch.contiguous_format)
        for index, out in enumerate(pipeline(self._source(count))):
            if not np.array_equal(out, expected[index]):
                raise BenchmarkError(
                    f"{self._where}: picture {index} of the pipeline differs from the loop's; nothing was "
                    "timed after it"
                )


def _rows(
    runners: Sequence[_Runner], rates: dict[str, list[tuple[int, float]]], common: Row
) -> list[Row]:
    rows = []
    per_second = {
        name: sum(count for count, _ in own) / sum(seconds for _, seconds in own)
        for name, own in rates.items()
    }
    compute = per_second.get("compute")
    for runner in runners:
        rounds = [count / seconds for count, seconds in rates[runner.name]]
        rate = per_second[runner.name]
        rows.append({
            **common,
            "peer": runner.name,
            "backend": _BACKENDS[runner.name],
            "pictures": sum(count for count, _ in rates[runner.name]),
            "pictures_per_s": rounded(rate),
            "slowest_per_s": rounded(min(rounds)),
            "fastest_per_s": rounded(max(rounds)),
            "share_of_compute": None if compute is None else rounded(rate / compute),
            "error_vs_float64": rounded(runner.error),
        })  # fmt: skip
    return rows
