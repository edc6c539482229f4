"""torch's own viewer reads what is written."""

import pickle
import random

import pytest
from torch.cuda import _memory_viz

from vramplan.memory.birth import Birth
from vramplan.simulate.replay import replay
from vramplan.simulate.snapshot import write_snapshot
from vramplan.simulate.trace import Trace
from vramplan.spec.alloc_conf import AllocConf
from vramplan.units import MIB

BIRTHS = [
    Birth(
        op="aten.mm", module="model.layers.0.mlp", frame="modeling_llama.py:120 forward", phase="step1.micro1.forward"
    ),
    Birth(op="aten.empty", frame="stage_1_and_2.py:900 allocate", outer_frame="engine.py:10 step"),
]


@pytest.fixture
def trace():
    """Two hundred blocks of all sizes on two streams, half of them dead in the end."""
    draw = random.Random(3)
    made = Trace(births=BIRTHS)
    live = []
    for number in range(200):
        size = draw.choice([1000, 70_000, 3 * MIB, 11 * MIB, 50 * MIB])
        live.append(made.bear(size + number, number % 2, stream=number % 5 == 0))
        if number % 2:
            made.bury(live.pop(draw.randrange(len(live))))
    made.cache_emptied_at.append(150)
    return made


@pytest.mark.parametrize("conf", ["", "expandable_segments:True", "max_split_size_mb:20"])
def test_torchs_functions_read_it_and_agree_on_the_bytes(trace, conf, tmp_path):
    settings = AllocConf.parse(conf)
    write_snapshot(trace, tmp_path / "snapshot.pickle", settings)
    snapshot = pickle.loads((tmp_path / "snapshot.pickle").read_bytes())
    replayed = replay(trace, settings)
    asked = sum(trace.num_bytes[block] for block in trace.live_at(trace.num_instants).tolist())

    assert sum(segment["total_size"] for segment in snapshot["segments"]) == replayed.reserved[-1]
    assert sum(segment["allocated_size"] for segment in snapshot["segments"]) == replayed.allocated[-1]
    said = _memory_viz.segsum(snapshot)  # it adds up every segment and raises where the parts are not the whole
    assert f"total_reserved: {_memory_viz.Bytes(int(replayed.reserved[-1]))}\n" in said
    assert f"total_allocated: {_memory_viz.Bytes(asked)}\n" in said

    assert f"{len(snapshot['device_traces'][0])} entries\n" in _memory_viz.trace(snapshot)
    assert "model.layers.0.mlp" in _memory_viz.memory(snapshot, format_flamegraph=lambda lines: lines)
    page = _memory_viz.trace_plot(snapshot)
    assert "Active Memory Timeline" in page
    assert _memory_viz.segment_plot(snapshot)


def test_every_event_is_there_once(trace, tmp_path):
    entries = write_snapshot(trace, tmp_path / "snapshot.pickle")["device_traces"][0]
    counts = {action: sum(entry["action"] == action for entry in entries) for action in ("alloc", "free_completed")}
    assert counts == {"alloc": 200, "free_completed": 100}
    reserved = sum(entry["size"] for entry in entries if entry["action"] == "segment_alloc")
    reserved -= sum(entry["size"] for entry in entries if entry["action"] == "segment_free")
    assert reserved == replay(trace, AllocConf()).reserved[-1]
    assert any(entry["action"] == "segment_free" for entry in entries)
    frames = next(entry["frames"] for entry in entries if entry["action"] == "alloc")
    assert {"name": "forward", "filename": "modeling_llama.py", "line": 120} in frames
    # the viewer is JavaScript: addresses are whole numbers there below 2**53
    assert all(0 <= entry["addr"] < 2**53 for entry in entries)


def test_it_ends_with_the_allocation_that_fails(trace, tmp_path):
    limit = 200 * MIB
    entries = write_snapshot(trace, tmp_path / "snapshot.pickle", limit_bytes=limit)["device_traces"][0]
    failure = replay(trace, AllocConf(), limit).failure
    assert failure is not None
    assert (entries[-1]["action"], entries[-1]["size"]) == ("oom", failure.num_bytes)
    assert entries[-1]["device_free"] == limit - failure.reserved_bytes
    assert "raise OutOfMemoryError" in _memory_viz.trace({"segments": [], "device_traces": [entries]})
