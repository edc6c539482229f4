"""From what is left of a run to its cause; texts are those that torch, gloo and DeepSpeed's launcher wrote."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from vramplan.measure.marker import Marker, MemoryState, is_out_of_memory, requested_bytes
from vramplan.rank.baton import CompilerEnded
from vramplan.supervise.attempts import Attempt
from vramplan.supervise.classify import MEMORY_CAUSES, Cause, Evidence, RankState, classify

CPU = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
CPU_TEXT = f"{CPU}58720256 bytes. Error code 12 (Cannot allocate memory)"
CUDA_TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.2 GiB"
CLOSED = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3421"


def marker(rank: int = 1, phase: str = "step3.micro1.forward", message: str = CPU_TEXT, **fields) -> Marker:
    base = {"kind": "RuntimeError", "by_user": False, "exit_code": 86, "time": 10.0, "step": 3}
    return Marker(rank=rank, phase=phase, message=message, **{**base, **fields})


def cause_of(*markers: Marker, **fields) -> Cause:
    return classify(Evidence(**{"launcher_code": 86, "markers": markers, **fields})).cause


@pytest.mark.parametrize(
    ("phase", "step", "traceback", "cause"),
    [
        ("step3.micro1.forward", 3, "File modeling_llama.py\n  hidden = self.mlp(hidden)", Cause.ACTIVATIONS),
        ("step3.micro1.forward", 3, "  loss = self.loss_function(logits=logits)\n in cross_entropy", Cause.LOGITS),
        ("step3.micro2.backward", 3, "Variable._execution_engine.run_backward(", Cause.ACTIVATIONS),
        ("step3.micro2.backward", 3, "  self.reduce_ipg_grads(comm_dtype)", Cause.REDUCTION),
        ("step1.micro2.optimizer_step", 1, "", Cause.FIRST_STEP),
        ("step4.micro2.optimizer_step", 4, "", Cause.STEP),
        ("model_load", 0, "", Cause.LOAD),
        ("data", 0, "", Cause.LOAD),
        ("engine_init", 0, "", Cause.INIT),
        ("evaluation", 3, "", Cause.EVALUATION),
        ("save", 3, "", Cause.SAVE),
        ("resume", 0, "", Cause.RESUME),
    ],
)
def test_the_phase_and_the_place_tell_what_ran_out(phase, step, traceback, cause):
    assert cause_of(marker(phase=phase, step=step, traceback=traceback)) is cause
    assert cause in MEMORY_CAUSES


def test_unused_bytes_of_the_allocator_are_fragmentation():
    whole = MemoryState(requested=2000, allocated=5000, reserved=6999, free=100)
    pieces = MemoryState(requested=2000, allocated=5000, reserved=7000, free=100)
    assert cause_of(marker(message=CUDA_TEXT, memory=whole)) is Cause.ACTIVATIONS
    assert cause_of(marker(message=CUDA_TEXT, memory=pieces)) is Cause.FRAGMENTATION


PINNED = """  File "deepspeed/accelerator/abstract_accelerator.py", line 339, in pin_memory
    return self._torch_pin_memory(tensor)
  File "deepspeed/accelerator/abstract_accelerator.py", line 276, in _torch_pin_memory
    return tensor.pin_memory()
           ^^^^^^^^^^^^^^^^^^^
RuntimeError: CUDA error: out of memory
"""
FORWARD_OF_DRIVER = """  File "torch/nn/functional.py", line 1, in linear
    return torch._C._nn.linear(input, weight)
RuntimeError: CUDA error: out of memory
"""


@pytest.mark.parametrize(
    ("device", "kind", "message", "traceback", "cause"),
    [
        ("cuda", "RuntimeError", CPU_TEXT, "", Cause.HOST_MEMORY),
        ("cuda", "MemoryError", "", "", Cause.HOST_MEMORY),
        ("cuda", "OSError", "[Errno 12] Cannot allocate memory", "", Cause.HOST_MEMORY),
        ("cuda", "RuntimeError", "CUDA error: out of memory", PINNED, Cause.HOST_MEMORY),
        ("cuda", "RuntimeError", "CUDA error: out of memory", FORWARD_OF_DRIVER, Cause.STEP),
        ("cuda", "OutOfMemoryError", CUDA_TEXT, PINNED, Cause.STEP),
        ("rocm", "RuntimeError", CPU_TEXT, "", Cause.HOST_MEMORY),
        ("cpu", "RuntimeError", CPU_TEXT, "", Cause.STEP),
        ("", "RuntimeError", CPU_TEXT, "", Cause.STEP),
    ],
)
def test_the_hosts_memory_is_told_from_the_devices(device, kind, message, traceback, cause):
    said = marker(phase="step4.micro1.optimizer_step", kind=kind, message=message, traceback=traceback, device=device)
    verdict = classify(Evidence(86, (said,)))
    assert verdict.cause is cause
    assert "ran out of memory in step4.micro1.optimizer_step" in str(verdict)


def test_a_rank_without_memory_comes_before_its_peers_and_before_the_users_error():
    peer = marker(rank=0, message=CLOSED, time=5.0)
    by_user = marker(rank=2, message="row 3 is bad", by_user=True, time=6.0)
    verdict = classify(Evidence(86, (peer, by_user, marker(rank=1, time=9.0))))
    assert (verdict.cause, verdict.rank, verdict.is_memory) == (Cause.ACTIVATIONS, 1, True)


def test_who_was_first_of_two_that_ran_out():
    assert classify(Evidence(86, (marker(rank=0, time=9.0), marker(rank=1, time=8.0)))).rank == 1


@pytest.mark.parametrize("code", [-9, 247, 137])
def test_killed_is_host_memory_only_where_the_kernels_counter_rose(code):
    ranks = (RankState(0, "step2.micro1.forward", 2), RankState(1, "step2.micro1.backward", 2))
    echo = marker(rank=0, message=CLOSED)
    found = {"ranks": ranks, "dead": (1,), "launcher_code": code}
    killed = classify(Evidence(markers=(echo,), **found))
    assert (killed.cause, killed.rank, killed.phase) == (Cause.KILLED, 1, "step2.micro1.backward")
    assert killed.may_pass
    assert not killed.is_memory
    for_memory = classify(Evidence(markers=(echo,), oom_kills=1, **found))
    assert (for_memory.cause, for_memory.rank) == (Cause.HOST_MEMORY, 1)
    assert for_memory.is_memory


def test_a_counter_that_rose_for_another_process_is_not_ours():
    assert cause_of(marker(message="a bug", kind="ValueError", exit_code=1), oom_kills=2) is Cause.ERROR


def test_an_abort_for_want_of_memory_is_read_from_the_output():
    tails = {0: "", 1: "terminate called after throwing an instance of 'std::bad_alloc'"}
    assert cause_of(tails=tails, launcher_code=-6, ranks=(RankState(1, "save", 3),)) is Cause.HOST_MEMORY


def test_a_silent_rank_and_ranks_that_stand_still_are_a_hang():
    ranks = (RankState(0, "step2.micro1.backward", 2), RankState(1, "step2.micro1.forward", 2))
    silent = classify(Evidence(None, ranks=ranks, silent=(1,)))
    assert (silent.cause, silent.rank, silent.phase) == (Cause.HANG, 1, "step2.micro1.forward")
    assert classify(Evidence(None, ranks=ranks, stuck_s=2000.0)).cause is Cause.HANG
    assert silent.may_pass


def test_what_no_plan_mends():
    nan = marker(message="the loss is nan at step 4 (samples x)", by_user=True, kind="RunFailedError")
    assert cause_of(nan) is Cause.NAN
    overflow = "Current loss scale already at minimum - cannot decrease scale anymore. Exiting run."
    assert cause_of(marker(message=overflow, kind="Exception", exit_code=1), launcher_code=1) is Cause.NAN
    assert cause_of(marker(message="row 3 is bad", by_user=True)) is Cause.USER
    assert cause_of(marker(message="shape mismatch"), marker(rank=0, message=CLOSED, time=1.0)) is Cause.ERROR
    for cause in (Cause.NAN, Cause.USER, Cause.ERROR):
        assert cause not in MEMORY_CAUSES


def test_only_echoes_of_a_lost_connection():
    assert cause_of(marker(message=CLOSED), launcher_code=1) is Cause.COMMUNICATOR


def test_a_port_that_another_process_took_may_pass():
    taken = (
        "The server socket has failed to listen on any local network address. port: 50255, useIpv6: false, code: -98, "
        "name: EADDRINUSE, message: address already in use"
    )
    found = classify(Evidence(launcher_code=1, markers=(marker(0, "join", taken, kind="DistNetworkError"),)))
    assert found.may_pass


def test_another_runs_compiler_that_was_ended_may_pass():
    text = "the process that compiled deepspeed_shm_comm was ended: start again"
    found = classify(Evidence(1, (marker(0, "join", text, kind=CompilerEnded.__name__, exit_code=1),)))
    assert (found.cause, found.may_pass) == (Cause.COMPILER, True)
    assert str(found) == "rank 0 failed in join: an ended compiler"
    assert Attempt("p", "", found.cause.value).may_pass


def test_an_exit_code_without_a_whole_marker_tells_of_memory_by_the_phase():
    ranks = (RankState(0, "step2.micro1.backward", 2), RankState(1, "step1.micro2.optimizer_step", 1))
    lost = classify(Evidence(86, (marker(rank=0, message=CLOSED),), ranks, dead=(1,)))
    assert (lost.cause, lost.rank, lost.phase, lost.memory) == (Cause.FIRST_STEP, 1, ranks[1].phase, None)
    assert classify(Evidence(86, (marker(rank=0, message=CLOSED),), ranks)).rank == 1


def test_a_rank_that_ended_by_itself_without_a_word_was_not_killed():
    ranks = (RankState(0, "save", 3), RankState(1, "save", 3))
    assert classify(Evidence(2, ranks=ranks, dead=(1,))).cause is Cause.ERROR
    assert classify(Evidence(None, ranks=ranks, dead=(1,))).cause is Cause.KILLED
    echo = marker(rank=0, message=CLOSED, exit_code=1)  # rank 1 was killed, and its peer's code is the launcher's
    assert classify(Evidence(1, (echo,), ranks, dead=(1,))).cause is Cause.KILLED


def test_ranks_that_could_not_write_a_status_are_not_started_again():
    assert classify(Evidence(1)).cause is Cause.ERROR
    assert classify(Evidence(247)).may_pass
    assert classify(Evidence(1, ranks=(RankState(0, "save"),))).may_pass  # it was there, and may have been killed


def test_nothing_at_all_is_a_killed_process():
    assert classify(Evidence(0, ranks=(RankState(0, "save"),))).cause is Cause.KILLED


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("OutOfMemoryError", "any"),
        ("MemoryError", ""),
        ("RuntimeError", CPU_TEXT),
        ("RuntimeError", "CUDA error: out of memory"),
        ("RuntimeError", "CUDA driver error: out of memory"),
        ("RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ("DistBackendError", "NCCL error: ncclUnhandledCudaError: Cuda failure 2 'out of memory'"),
        ("OSError", "[Errno 12] Cannot allocate memory"),
        ("RuntimeError", "could not create a primitive"),
    ],
)
def test_out_of_memory_in_all_its_words(kind, message):
    assert is_out_of_memory(kind, message)


def test_other_errors_are_not_out_of_memory():
    assert not is_out_of_memory("RuntimeError", CLOSED)
    assert not is_out_of_memory("OSError", "[Errno 28] No space left on device")
    assert not is_out_of_memory("RuntimeError", "could not create a primitive descriptor for a matmul primitive")


def test_onednn_without_memory_is_out_of_memory():
    """For real: bf16 products under a limit that leaves ever more room, until one goes through."""
    code = """
import os, resource, sys, torch
from vramplan.measure.marker import is_out_of_memory
from vramplan.train.out_of_memory import data_bytes
told = set()
for room in range(0, 40 << 20, 512 << 10):
    if os.fork() == 0:
        a, b = torch.ones(512, 576).bfloat16(), torch.ones(8192, 576).bfloat16()
        limit = data_bytes() + room
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            torch.nn.functional.linear(a, b)
        except RuntimeError as error:
            os._exit((3 if "primitive" in str(error) else 2) if is_out_of_memory("RuntimeError", str(error)) else 1)
        os._exit(0)
    told.add(os.wait()[1] >> 8)
print(sorted(told))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    told = set(json.loads(done.stdout))
    assert 2 in told
    assert 1 not in told


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (CPU_TEXT, 58720256),
        (CUDA_TEXT, 2 * 2**30),
        ("Unable to allocate 512. MiB for an array with shape (64,)", 512 * 2**20),
        ("no size here", None),
    ],
)
def test_the_size_that_was_asked_for(message, size):
    assert requested_bytes(message) == size
