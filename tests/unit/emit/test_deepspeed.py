"""What is emitted, read back by DeepSpeed itself."""

from __future__ import annotations

import pytest

from vramplan.emit.deepspeed import CLIENT_OPTIMIZERS, ds_config, managed_accumulation
from vramplan.errors import SpecError
from vramplan.spec.load import merge, run_from_mapping

CLOSED = {
    "model": "x",
    "global_batch_size": 16,
    "micro_batch_size": 2,
    "grad_accum_steps": 4,
    "activation_checkpointing": "none",
    "layout": {"dp": 2},
    "zero": {"stage": 2, "offload_optimizer": "none", "offload_param": "none"},
}


def run(**fields):
    return run_from_mapping(merge(CLOSED, fields))


@pytest.fixture(scope="module")
def deepspeed_config():
    import deepspeed.comm
    import torch.distributed as dist
    from deepspeed.runtime.config import DeepSpeedConfig

    def read(config, world_size=2):
        class Ranks:
            def get_model_parallel_world_size(self):
                return 1

            def get_data_parallel_world_size(self):
                return world_size

        return DeepSpeedConfig(config, mpu=Ranks())

    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    yield read
    if started:
        dist.destroy_process_group()
        deepspeed.comm.comm.cdb = None


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "bf16-autocast"])
def test_deepspeed_reads_what_was_meant(deepspeed_config, stage, precision):
    asked = run(
        precision=precision, zero={"stage": stage, "reduce_bucket_size": 12345}, training={"max_grad_norm": 0.7}
    )
    read = deepspeed_config(ds_config(asked, 2))
    assert read.zero_optimization_stage == stage
    assert read.train_batch_size == 16
    assert read.train_micro_batch_size_per_gpu == 2
    assert read.gradient_accumulation_steps == 4
    assert read.managed_gradient_accumulation is False
    assert read.gradient_clipping == 0.7
    assert read.zero_config.reduce_bucket_size == 12345
    assert read.bfloat16_config.enabled == (precision == "bf16")
    assert read.float16_config.enabled == (precision == "fp16")
    assert bool(read.torch_autocast_enabled) == (precision == "bf16-autocast")
    assert read.optimizer_name == "adamw"


def test_formats_of_sums_and_states_reach_deepspeed(deepspeed_config):
    halves = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    read = deepspeed_config(ds_config(run(precision="bf16", zero={"stage": 2}, **halves), 2)).bfloat16_config
    assert (read.bf16_master_weights_and_grads, read.bf16_optimizer_states) == (True, True)
    summed = deepspeed_config(ds_config(run(precision="bf16", zero={"stage": 2}, grad_accum_dtype="fp32"), 2))
    assert summed.grad_accum_dtype == "fp32"
    assert not summed.bfloat16_config.bf16_master_weights_and_grads


def test_what_the_spec_leaves_alone_is_deepspeeds_default(deepspeed_config):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for stage in (0, 1, 2, 3):
        read = deepspeed_config(ds_config(run(zero={"stage": stage}), 2)).zero_config
        assert read == DeepSpeedZeroConfig(stage=stage)


def test_offload_reaches_deepspeed(deepspeed_config):
    asked = run(zero={"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"})
    read = deepspeed_config(ds_config(asked, 2)).zero_config
    assert read.offload_optimizer.device == "cpu"
    assert read.offload_param.device == "cpu"
    assert read.offload_optimizer.pin_memory


@pytest.mark.parametrize("kind", ["adamw", "adamw_torch", "sgd", "adafactor", "muon"])
def test_named_optimizers_carry_their_numbers(kind):
    section = ds_config(run(optimizer={"kind": kind, "lr": 0.25, "weight_decay": 0.5}), 2)["optimizer"]
    assert section["params"]["lr"] == 0.25
    assert section["params"]["weight_decay"] == 0.5
    assert section["params"].get("torch_adam", False) == (kind == "adamw_torch")


@pytest.mark.parametrize("kind", sorted(CLIENT_OPTIMIZERS))
def test_optimizers_that_are_handed_over_are_not_named(kind):
    config = ds_config(run(optimizer={"kind": kind}), 2)
    assert "optimizer" not in config
    assert config["zero_allow_untested_optimizer"]


def test_the_rate_follows_the_method():
    assert ds_config(run(), 2)["optimizer"]["params"]["lr"] == 1e-5
    assert ds_config(run(method="lora"), 2)["optimizer"]["params"]["lr"] == 2e-4


@pytest.mark.parametrize(
    ("zero", "layout", "managed"),
    [
        ({"stage": 0}, {"dp": 2}, False),
        ({"stage": 1, "overlap_comm": True}, {"dp": 2}, True),
        ({"stage": 0, "overlap_comm": True}, {"dp": 2}, True),
        ({"stage": 2, "overlap_comm": True}, {"dp": 2}, False),
        ({"stage": 3}, {"dp": 2}, False),
        ({"stage": 1}, {"dp": 1, "pp": 2}, True),
    ],
)
def test_deepspeed_counts_micro_batches_only_where_it_insists(zero, layout, managed):
    asked = run(zero=zero, layout=layout)
    assert managed_accumulation(asked) is managed
    assert ds_config(asked, 2)["managed_gradient_accumulation"] is managed


def test_parallel_degrees_reach_their_sections():
    assert ds_config(run(layout={"dp": 1, "tp": 2}), 2)["tensor_parallel"] == {"autotp_size": 2}
    config = ds_config(run(layout={"dp": 1, "sp": 2}), 2)
    assert (config["sequence_parallel_size"], config["data_parallel_size"]) == (2, 1)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"micro_batch_size": None}, "micro_batch_size is not decided"),
        ({"zero": {"stage": None}}, "zero.stage is not decided"),
        ({"layout": {"dp": 4}}, "layout makes 4 ranks, but 2 are to run"),
    ],
)
def test_an_open_run_is_refused(fields, said):
    with pytest.raises(SpecError, match=said):
        ds_config(run(**fields), 2)


def test_keys_that_are_not_the_default_are_passed_on(deepspeed_config):
    rare = {"parameter_alignment": True, "allgather_partitions": False, "memory_efficient_linear": False}
    second = ds_config(run(zero=rare), 2)["zero_optimization"]
    assert second["parameter_alignment"] is True
    assert second["allgather_partitions"] is False
    assert not {"memory_efficient_linear", "elastic_checkpoint"} & second.keys()
    third = ds_config(run(zero=rare | {"stage": 3}), 2)
    assert deepspeed_config(third).zero_config.memory_efficient_linear is False
