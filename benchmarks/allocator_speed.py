"""How fast a trace is replayed through the caching allocator: ``python benchmarks/allocator_speed.py [EVENTS]``.

The trace is shaped as training is: weights that stay, then steps in which layers leave activations of several sizes
that die in reverse order, with temporaries born and dead between them.
"""

from __future__ import annotations

import random
import sys
import time

from vramplan.memory.birth import Birth
from vramplan.simulate.replay import replay
from vramplan.simulate.trace import Trace
from vramplan.spec.alloc_conf import AllocConf
from vramplan.units import KIB, MIB, format_bytes

CONFS = ("", "expandable_segments:True", "max_split_size_mb:64", "roundup_power2_divisions:8")


def make_trace(num_events: int, layers: int = 80, seed: int = 0) -> Trace:
    draw = random.Random(seed)
    sizes = [
        draw.choice((2 * KIB, 100 * KIB, 3 * MIB, 16 * MIB, 64 * MIB)) + 512 * draw.randrange(40) for _ in range(24)
    ]
    trace = Trace(births=[Birth(op="aten::empty")])
    for _ in range(9 * layers):
        trace.bear(draw.randrange(1, 90) * MIB, 0)
    while trace.num_instants < num_events:
        kept = []
        for _ in range(layers):
            for size in sizes:
                temporary = trace.bear(size * 2, 0)
                kept.append(trace.bear(size, 0))
                trace.bury(temporary)
        for block in reversed(kept):
            temporary = trace.bear(trace.num_bytes[block], 0)
            trace.bury(block)
            trace.bury(temporary)
    return trace


def main() -> None:
    num_events = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    trace = make_trace(num_events)
    for conf in CONFS:
        started = time.process_time()
        found = replay(trace, AllocConf.parse(conf))
        took = time.process_time() - started
        each = took / trace.num_instants * 1e6
        allocated, reserved = format_bytes(int(found.allocated.max())), format_bytes(int(found.reserved.max()))
        print(
            f"{conf or 'defaults':28} {trace.num_instants:>9} events {took:6.2f} s of CPU, {each:5.2f} us each, "
            f"allocated {allocated}, reserved {reserved}"
        )


if __name__ == "__main__":
    main()
