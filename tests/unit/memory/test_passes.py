"""What a run passes besides its steps, in the batch of one rank."""

from vramplan.facts.device import Device, Node
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.from_run import job_from_run
from vramplan.memory.passes import Batch, job_of_batch
from vramplan.spec.run import RunSpec
from vramplan.units import TIB


def test_an_evaluation_of_the_batch_of_a_step_has_its_chunks():
    run = RunSpec(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        seq_len=6000,
        micro_batch_size=1,
        grad_accum_steps=1,
        activation_checkpointing="none",
        layout={"dp": 1, "sp": 3},
        loss="chunked",
        tiled_mlp=True,
        zero={"stage": 1, "offload_optimizer": "none", "offload_param": "none"},
    )
    job = job_from_run(run, Node(Device("CPU", "cpu", TIB, TIB), 3), resolve_architecture(run))
    evaluated = job_of_batch(job, Batch(1, 6000))
    assert job.chunk_rows == (1365, 635)
    assert (evaluated.chunk_rows, evaluated.tile_rows, evaluated.basis) == (job.chunk_rows, job.tile_rows, job.basis)
    assert job_of_batch(job, Batch(1, 1)).tile_rows == 1  # an export's, whose ranks share no sequence
