"""What the line of progress is told of memory."""

import torch

from vramplan.measure.record import PhaseReading
from vramplan.train.metrics import Memory, peak_resident_bytes, resident_bytes


def test_until_tensors_are_measured_the_peak_is_the_process_s():
    memory = Memory(torch.device("cpu"))
    before = memory.fields()
    assert before["memory_of"] == before["memory_peak_of"] == "process"
    assert resident_bytes() // 2 < before["memory_peak"] <= peak_resident_bytes()


def test_then_it_is_that_of_tensors():
    memory = Memory(torch.device("cpu"))
    memory.learn([PhaseReading("step1.micro1.forward", 4_096, 1_024)])
    after = memory.fields()
    assert (after["memory_peak"], after["memory_peak_of"], after["memory_of"]) == (4_096, "tensors", "process")
