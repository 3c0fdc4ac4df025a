"""A made-up tree of runs in which everything that a report shows occurs: see `make_tree`."""

import base64
import copy
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import yaml
from PIL import Image

from harness.messages import CollectiveTraffic
from harness.metrics.difference import Difference
from harness.metrics.fidelity import Fidelity
from harness.metrics.intervals import Estimate, wilson
from harness.metrics.load import LoadSummary, Percentiles
from harness.metrics.paired import ratio
from harness.metrics.quality import Quality
from harness.metrics.summary import summarize
from harness.records.comparison import Comparison
from harness.records.media import save_png
from harness.records.record import CacheUse, Record, Repeat, RunFolder, SampleRow, Status
from harness.resolve.compose import compose_run, to_dict
from tests.harness.test_records import record

HOSTILE = "<b>x</b></script><script>fetch('https://example.com')</script> %{x} \"it's\" & $x$ /*script*/ \u2028"


class Maker:
    """Makes records from one composed configuration, which takes a second, and changes to it."""

    def __init__(self) -> None:
        self._config = to_dict(compose_run([]).config)

    def config(self, changes: Mapping[str, object]) -> dict[str, Any]:
        """The default configuration with some dotted keys changed."""
        made = copy.deepcopy(self._config)
        for key, value in changes.items():
            *groups, last = key.split(".")
            node = made
            for group in groups:
                node = node[group]
            assert last in node, key
            node[last] = value
        return made

    def record(
        self,
        changes: Mapping[str, object],
        latency_ms: float,
        pixel: Difference | None = None,
        verdict: str = "approximate",
        hits: int = 40,
        ranks: int = 1,
        notes: Sequence[str] = (),
    ) -> Record:
        """A record with made-up numbers; its overrides are the changes."""
        base, config = record(latency_ms), self.config(changes)
        times = [latency_ms * factor for factor in (0.98, 1.02, 1.0, 1.01, 1.0)]
        stages = {"text_encoding": 0.05, "denoising": 0.8, "decoding": 0.15}
        share, gap = wilson(hits, 48), Estimate(4 / hits, (3.5 / hits, 4.6 / hits), 48)
        summary = msgspec.structs.replace(
            base.summary,
            latency_ms=summarize(times),
            stage_ms={name: summarize([part * time for time in times]) for name, part in stages.items()},
            achieved_tflops=0.02,
            ceiling_tflops=0.05,
            comm={"denoising": {"all_to_all": CollectiveTraffic(2_500_000, 4, 1.0)}} if ranks > 1 else {},
        )
        fidelity = pixel and Fidelity("approximate", ["solver"], pixel, pixel, 1e-7, 1e-7, verdict, "k")
        return msgspec.structs.replace(
            base,
            overrides=[f"{key}={value}" for key, value in changes.items()],
            config=config,
            provenance=msgspec.structs.replace(base.provenance, world_size=ranks),
            repeats=[Repeat(t, t + 1, [], base.repeats[0].denoise_steps_ms, {}, []) for t in times],
            summary=summary,
            samples=[SampleRow("samples/0000.png", str(config["request"]["prompts"][0]), 0, "ab")],
            notes=list(notes),
            quality=Quality("ab", 48, 0, 48, 1 / 256, share, share, None, gap, None, None),
            fidelity=fidelity,
        )


def write(folder: Path, row: Record, status: Status | None = None, colour: int = 90) -> None:
    """A finished run with a grid of one colour."""
    claimed = RunFolder.claim(folder)
    claimed.write_record(row)
    claimed.finish(status or Status("ok"))
    save_png(folder / "grid.png", np.full((700, 900, 3), colour, np.uint8), {})


def apart(error: float) -> Difference:
    """Pixels with this relative L2; 0 is equal."""
    return Difference(error, error, None if error == 0 else -20 * float(np.log10(error)), 1 - error, error == 0)


def make_tree(root: Path) -> None:
    """Fifteen rows: three solver runs, the third slower and worse than the second, and a fourth that is equal to its
    reference; a broken one; three layouts; a comparison with its two sides; one with hostile text; one refused; one out
    of memory, with its configuration; one unreadable.
    """
    make = Maker()
    for solver, steps, time, error in (("euler", 4, 100, 0.3), ("euler", 8, 200, 0.1), ("heun", 4, 210, 0.2)):
        own = {"scheduler.solver.name": solver, "request.steps": steps}
        row = make.record(own, time, apart(error), hits=40 + steps // 4, notes=["shared note"])
        write(root / f"{solver}{steps}", row)
    exact = {"scheduler.solver.name": "heun", "request.steps": 8}
    write(root / "heun8", make.record(exact, 400, apart(0.0), "identical", hits=47), colour=200)
    broken = make.record({"attention.backend": "math"}, 90, apart(0.01), "broken")
    write(root / "broken", broken, Status("failed", "broken: declared exact"))
    for layout, degrees, time in (
        ("single", {}, 300),
        ("dp2", {"dp": 2}, 160),
        ("usp4", {"ring": 2, "ulysses": 2}, 100),
    ):
        own = {f"parallel.{axis}": degree for axis, degree in degrees.items()} | {"request.samples_per_prompt": 2}
        write(root / "layouts" / layout, make.record(own, time, ranks=math.prod(degrees.values())))
    write_comparison(root / "compared", make)
    hostile = make.record({"request.prompts": [HOSTILE]}, 150, apart(0.2), notes=[HOSTILE])
    write(root / "hostile", hostile)
    RunFolder.claim(root / "refused").finish(Status("failed", "no such | solver"))
    large = RunFolder.claim(root / "large")
    large.write_config(yaml.safe_dump(make.config({"request.batch_size": 64})))
    large.finish(Status("oom", f"out of memory {HOSTILE}"))
    unreadable = RunFolder.claim(root / "unreadable")
    (unreadable.path / "record.json").write_text("{")
    (unreadable.path / "grid.png").write_text("no picture")
    unreadable.finish(Status("ok"))


def write_comparison(folder: Path, make: Maker) -> None:
    """Two layouts in alternation, either with its row."""
    a, b = [200.0 + k % 3 for k in range(16)], [110.0 + k % 2 for k in range(16)]
    claimed = RunFolder.claim(folder)
    found = {"request": ratio(a, b), "step": ratio(a, b)}
    efficiency = {name: row.ratio / 2 for name, row in found.items()}
    sides = (["parallel=single"], ["parallel=ulysses2"])
    output = Difference(1e-7, 1e-6, 140.0, 1.0)
    made = Comparison(1, [], *sides, (1, 2), found, efficiency, output, ["note of a comparison"])
    claimed.write_json("comparison.json", made)
    claimed.write_config(yaml.safe_dump(make.config({"task.name": "compare"})))
    claimed.finish(Status("ok"))
    write(folder / "a", make.record({"task.name": "bench"}, 200.0))
    write(folder / "b", make.record({"task.name": "bench", "parallel.ulysses": 2}, 110.0, ranks=2))


def make_loads(root: Path) -> None:
    """Seven rows: batches of 1 and of 8 at three rates each, the first past what it can answer at the last two; and a
    comparison of the two.
    """
    make = Maker()
    for batch, capacity in ((1, 3.0), (8, 9.0)):
        for rate in (2.0, 4.0, 8.0):
            reached = min(rate, capacity)
            summary = under_load(rate, reached, 1e3 / capacity * (1 if rate < capacity else 20))
            row = make.record({"task.name": "load", "load.rate": rate, "serve.max_batch": batch}, 1.0)
            write(
                root / f"batch{batch}" / f"{rate:g}",
                msgspec.structs.replace(row, load=summary, summary=None, repeats=[]),
            )
    a, b = [320.0 + k % 3 for k in range(8)], [120.0 + k % 2 for k in range(8)]
    found = {name: ratio(a, b) for name in ("answer", "latency_p50", "latency_p99")}
    claimed = RunFolder.claim(root / "compared")
    sides = (["serve.max_batch=1"], ["serve.max_batch=8"])
    claimed.write_json("comparison.json", Comparison(1, [], *sides, (1, 1), found, None, None))
    claimed.write_config(yaml.safe_dump(make.config({"task.name": "load"})))
    claimed.finish(Status("ok"))


def make_caches(root: Path) -> None:
    """Four rows: a cache that is better than fewer steps, one that is worse, and two plain runs around them."""
    make = Maker()
    for steps, time, error in ((5, 100, 0.3), (20, 400, 1e-7)):
        write(root / f"plain{steps}", make.record({"request.steps": steps}, time, apart(error)))
    for threshold, error in ((0.1, 0.05), (0.3, 0.25)):
        own = {"cache.name": "first_block", "cache.threshold": threshold, "request.steps": 20}
        row = make.record(own, 200, apart(error))
        spared = msgspec.structs.replace(row.timed, cache=CacheUse(20, 8, 40, 16), nfe=8)
        write(root / f"cached{threshold}", msgspec.structs.replace(row, summary=spared))


def under_load(rate: float, reached: float, p50: float) -> LoadSummary:
    """What clients might have measured."""
    latency = Percentiles(100, p50, 2 * p50, 3 * p50, 1.1 * p50)
    return LoadSummary(
        "zmq", rate, None, 50.0, 100 / reached, 105, {"ok": 100, "busy": 5}, 0, latency, latency, None, reached,
        slo_ms=500.0, goodput_per_s=reached / 2, evaluations=100, pictures_per_evaluation=2.0,
    )  # fmt: skip


def page_image(uri: str) -> Image.Image:
    """The picture in a data URI."""
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
