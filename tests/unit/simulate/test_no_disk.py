"""A simulated run leaves alone what lies where its offload would write."""

from __future__ import annotations

from vramplan.simulate.no_disk import elsewhere
from vramplan.spec.run import RunSpec


def test_files_go_to_a_directory_of_the_simulation(tmp_path):
    run = RunSpec(model="llama", zero={"stage": 3, "offload_optimizer": "nvme", "nvme_path": str(tmp_path)})
    with elsewhere(run) as moved:
        assert moved.zero.nvme_path != str(tmp_path)
        assert moved.zero.offload_optimizer == "nvme"
    plain = RunSpec(model="llama")
    with elsewhere(plain) as same:
        assert same is plain
