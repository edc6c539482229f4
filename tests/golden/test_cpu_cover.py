"""The estimator against `vramplan bench run` on the CPU: a file for each rarer way to train that it covers."""

from pathlib import Path

import pytest

from vramplan.measure.compare import estimate_record
from vramplan.measure.record import read_records

MEASURED = Path(__file__).with_name("measured")
FILES = {
    "cpu_padded.jsonl": 26,  # BLOOM, Falcon with ALiBi and rotary, Ulysses: padded and packed, eager and sdpa
    "cpu_tensor_parallel.jsonl": 13,  # DeepSpeed's AutoTP on 2 and 4 ranks, nine families
    "cpu_reentrant.jsonl": 5,  # reentrant checkpointing, every layer or one of two
    "cpu_chunked_loss.jsonl": 7,  # DeepSpeed's, its logits in one block and in several
    "cpu_bf16_variants.jsonl": 32,  # fp32 sums beside bf16 weights, bf16 master weights and moments; ZeRO 1 to 3
    "cpu_layers_whole.jsonl": 5,  # stage3_module_granularity_threshold, five families
    "cpu_checkpoint_every.jsonl": 8,  # one layer of 2, 3 or 4 is recomputed
}
"""Files and how many records of each the estimator covers; taken with torch 2.13.0, transformers 5.17.0, deepspeed
0.19.8."""


@pytest.mark.parametrize(("name", "count"), FILES.items())
def test_peaks_and_phases(name, count):
    records = list(read_records(MEASURED / name))
    assert len(records) == count
    for record in records:
        found = estimate_record(record)
        peak = record.measured.train_allocated_peak_bytes
        assert found.train_allocated_peak_bytes == pytest.approx(peak, rel=0.01), record.id
        measured = {phase.phase: phase for phase in record.measured.phases}
        for phase in found.phases[2:]:
            where = f"{record.id} {phase.phase}"
            assert phase.peak_bytes == pytest.approx(measured[phase.phase].allocated_peak_bytes, rel=0.02), where
            assert phase.end_bytes == pytest.approx(measured[phase.phase].allocated_end_bytes, rel=0.02), where
