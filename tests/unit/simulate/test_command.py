"""``vramplan simulate`` as a user calls it: JSON, report, exit codes, sentences."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys

import pytest
from torch.cuda import _memory_viz

TINY = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}
CLOSED = ("--seq-len", "128", "--micro-batch", "2", "--zero", "2", "--offload", "none", "--checkpointing", "none")


def vramplan(*words):
    return subprocess.run([sys.executable, "-m", "vramplan", *words], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    (root / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    return str(root)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out") / "new" / "simulated"


@pytest.fixture(scope="module")
def found(model, out):
    """The JSON of a run that is simulated once, which also writes its files to ``out``."""
    done = vramplan("simulate", model, *CLOSED, "--gpu", "rtx4090", "--gpus", "4", "--json", "-o", str(out))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_json_has_the_keys_of_fit_and_its_own(model, found):
    fitted = json.loads(vramplan("fit", model, *CLOSED, "--gpu", "rtx4090", "--gpus", "4", "--json").stdout)
    assert set(fitted) <= set(found)
    assert set(fitted["plan"]) - {"step_time_s", "tokens_per_s", "margin_frac"} <= set(found["plan"])
    assert found["fits"] is True
    assert found["params_total"] == fitted["params_total"]
    assert sum(found["categories"].values()) == found["allocated_peak_bytes_per_rank"]
    assert sum(term["bytes"] for term in found["terms"]) == found["used_peak_bytes_per_rank"]
    assert found["allocated_peak_bytes_per_rank"] == max(phase["peak_bytes"] for phase in found["phases"])
    assert all(phase["reserved_peak_bytes"] >= phase["peak_bytes"] for phase in found["phases"])
    assert found["allocated_peak_bytes_per_rank"] == pytest.approx(fitted["allocated_peak_bytes_per_rank"], rel=0.01)
    assert found["largest_live"][0]["frame"]


@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_pinned_memory_of_the_host_is_fits(model, offload):
    """Stage 3: masters are not pinned, the flat gradients are, each block as large as a power of two."""
    words = (model, "--seq-len", "128", "--micro-batch", "2", "--zero", "3", "--offload", offload)
    words += ("--checkpointing", "none", "--gpu", "rtx4090", "--gpus", "4", "--json")
    simulated, fitted = (json.loads(vramplan(command, *words).stdout) for command in ("simulate", "fit"))
    assert simulated["pinned_host_bytes_per_node"] == fitted["pinned_host_bytes_per_node"] > 0
    assert simulated["pinned_host_bytes_per_node"] < simulated["host_bytes_per_node"]


def test_two_capacities_are_one_too_many(model):
    done = vramplan("simulate", model, *CLOSED, "--cap", "24GiB", "--memory-cap", "20GiB")
    assert done.returncode == 2
    assert "--cap 24GiB and --memory-cap 20GiB say different things: give one of them" in done.stderr


def test_a_page_and_a_snapshot_are_written(found, out):
    assert sorted(path.name for path in out.iterdir()) == ["snapshot.pickle", "timeline.html"]
    assert found["files"] == [str(out / "timeline.html"), str(out / "snapshot.pickle")]
    page = (out / "timeline.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))
    totals = [sum(sizes) for sizes in zip(*(sizes for _, sizes in data["categories"]), strict=True)]
    assert max(totals) == found["allocated_peak_bytes_per_rank"]
    assert len(data["largest"]) == len(totals)
    assert any("lm_head" in birth for birth in data["births"])
    assert 'id="capacity"' in page
    snapshot = pickle.loads((out / "snapshot.pickle").read_bytes())
    live = found["phases"][-1]["end_bytes"]
    assert f"total_allocated: {_memory_viz.Bytes(live)}\n" in _memory_viz.segsum(snapshot)
    entries = snapshot["device_traces"][0]
    reserved = peak = 0
    for entry in entries:
        reserved += entry["size"] * {"segment_alloc": 1, "segment_free": -1}.get(entry["action"], 0)
        peak = max(peak, reserved)
    assert peak == found["reserved_peak_bytes_per_rank"]
    assert "Active Memory Timeline" in _memory_viz.trace_plot(snapshot)


def test_where_nothing_can_be_written_is_said_before_simulating(model, tmp_path):
    taken = tmp_path / "file"
    taken.write_text("", encoding="utf-8")
    done = vramplan("simulate", model, *CLOSED, "--gpu", "rtx4090", "-o", str(taken))
    assert done.returncode == 2
    assert done.stderr.strip() == f"vramplan: {taken}: cannot be written (File exists); choose another -o"


def test_the_first_allocation_that_fails_is_named(model):
    done = vramplan("simulate", model, *CLOSED, "--cap", "1000MiB", "--set", "zero.reduce_bucket_size=100000000")
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("DOES NOT FIT")
    assert "the allocation of " in done.stdout
    assert "stage_1_and_2.py" in done.stdout


def test_code_that_comes_with_a_model_runs_only_when_allowed(tmp_path):
    marker = tmp_path / "ran"
    fields = {**TINY, "model_type": "homemade", "architectures": ["HomeModel"]}
    fields["auto_map"] = {"AutoConfig": "home.HomeConfig", "AutoModelForCausalLM": "home.HomeModel"}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    (tmp_path / "home.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class HomeConfig(LlamaConfig):\n    model_type = 'homemade'\n"
        "class HomeModel(LlamaForCausalLM):\n    config_class = HomeConfig\n",
        encoding="utf-8",
    )
    refused = vramplan("simulate", str(tmp_path), *CLOSED, "--cap", "8GiB")
    assert refused.returncode == 2
    assert "--trust-remote-code" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not marker.exists()
    allowed = vramplan("simulate", str(tmp_path), *CLOSED, "--cap", "8GiB", "--trust-remote-code", "--json")
    assert allowed.returncode == 0, allowed.stderr
    assert marker.exists()
    assert json.loads(allowed.stdout)["phases"][-1]["phase"] == "step2.micro1.optimizer_step"


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ("x[x.sum(-1) > 0]", "aten.nonzero"),
        pytest.param("x if x.sum() > 0 else -x", "goes by a tensor's value", marks=pytest.mark.slow),
        pytest.param("torch.from_numpy(x.float().numpy()).to(x)", ".numpy()", marks=pytest.mark.slow),
        pytest.param("double(x)", "homemade", marks=pytest.mark.slow),
        ("by_address(x)", "SIGSEGV"),
    ],
)
def test_what_cannot_be_traced_is_named_and_earlier_phases_are_kept(tmp_path, odd, said):
    fields = {**TINY, "model_type": "homemade", "architectures": ["HomeModel"]}
    fields["auto_map"] = {"AutoConfig": "odd.HomeConfig", "AutoModelForCausalLM": "odd.HomeModel"}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    (tmp_path / "odd.py").write_text(
        "import ctypes\n"
        "import torch\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "@torch.library.custom_op('homemade::double', mutates_args=())\n"
        "def double(x: torch.Tensor) -> torch.Tensor:\n    return x * 2\n"
        "def by_address(x):\n    ctypes.memset(x.data_ptr(), 0, 16)\n    return x\n"
        "class HomeConfig(LlamaConfig):\n    model_type = 'homemade'\n"
        "class Odd(torch.nn.Module):\n"
        "    def forward(self, x, *args, **kwargs):\n"
        f"        return {odd}\n"
        "class HomeModel(LlamaForCausalLM):\n"
        "    config_class = HomeConfig\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.model.layers[1].mlp = Odd()\n",
        encoding="utf-8",
    )
    words = ("simulate", str(tmp_path), *CLOSED, "--cap", "8GiB", "--trust-remote-code", "--json")
    done = vramplan(*words)
    assert done.returncode == 2
    assert "model.layers.1.mlp" in done.stderr
    assert said in done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] is None
    assert [phase["phase"] for phase in found["phases"]][:2] == ["model_load", "engine_init"]
    assert found["phases"][1]["peak_bytes"] > 0


def test_a_package_that_a_model_needs_is_named_beside_the_model(tmp_path):
    fields = {**TINY, "model_type": "homemade", "architectures": ["HomeModel"]}
    fields["auto_map"] = {"AutoConfig": "odd.HomeConfig", "AutoModelForCausalLM": "needs.HomeModel"}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    config = "from transformers import LlamaConfig\nclass HomeConfig(LlamaConfig):\n    model_type = 'homemade'\n"
    (tmp_path / "odd.py").write_text(config, encoding="utf-8")
    (tmp_path / "needs.py").write_text("import no_such_kernels\n", encoding="utf-8")
    done = vramplan("simulate", str(tmp_path), *CLOSED, "--cap", "8GiB", "--trust-remote-code")
    assert done.returncode == 2
    assert "model_load: the model cannot be simulated: ImportError" in done.stderr
    assert "no_such_kernels" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("meta-lama/Llama-3.1-8B",), "did you mean"),
        (("meta-llama/Llama-3.1-8B", "--cap", "much"), "--cap"),
        (("meta-llama/Llama-3.1-8B", "--cap", "0"), "more than 0"),
        (("absent.yaml",), "absent.yaml"),
    ],
)
def test_bad_input_is_one_sentence(words, said):
    done = vramplan("simulate", *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
