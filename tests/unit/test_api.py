"""The Python surface: what it takes, what it answers, and that it prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import vramplan

RUN = {
    "model": "meta-llama/Llama-3.1-8B",
    "global_batch_size": 64,
    "seq_len": 4096,
    "hardware": {"gpu": "h100-80gb", "gpus_per_node": 8, "host_memory": "2TiB"},
}


def test_a_run_may_be_a_spec_a_mapping_a_file_or_a_model(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: meta-llama/Llama-3.1-8B\nglobal_batch_size: 64\nseq_len: 4096\n"
        "hardware: {gpu: h100-80gb, gpus_per_node: 8, host_memory: 2TiB}\n"
    )
    fields = {key: value for key, value in RUN.items() if key != "model"}
    forms = (vramplan.RunSpec(**RUN), RUN, path, str(path))
    answers = [vramplan.plan(form) for form in forms]
    answers.append(vramplan.plan("meta-llama/Llama-3.1-8B", **fields))
    assert all(answer.run == answers[0].run for answer in answers)


def test_keywords_are_laid_over_the_run():
    assert vramplan.plan(RUN, zero={"stage": 3}).run.zero.stage == 3
    spec = vramplan.RunSpec(**RUN)
    assert vramplan.plan(spec, method="lora").run.method.kind == "lora"
    assert spec.method.kind == "full"


def test_a_node_may_be_given():
    node = vramplan.plan(RUN).node
    smaller = vramplan.Node(node.device, 4, host_memory_bytes=node.host_memory_bytes)
    assert vramplan.plan(RUN, smaller).run.layout.dp == 4


def test_fit_estimate_and_plan_agree():
    fit, plan = vramplan.fit(RUN), vramplan.plan(RUN)
    assert fit.fits
    assert fit.plan.run == plan.run
    estimate = vramplan.estimate(plan.run, plan.node)
    assert estimate.used_peak_bytes == fit.estimate.used_peak_bytes == plan.prediction.used_peak_bytes


def test_errors_are_vramplans_own():
    with pytest.raises(vramplan.VramplanError, match="did you mean"):
        vramplan.fit("meta-llama/Llama-3.1-8X")
    with pytest.raises(vramplan.VramplanError, match="unknown key 'seqlen'"):
        vramplan.fit(RUN, seqlen=3)


@pytest.mark.parametrize("answer", [vramplan.fit, vramplan.estimate, vramplan.plan], ids=["fit", "estimate", "plan"])
def test_results_print_in_terminal_and_notebook(answer):
    result = answer(RUN)
    assert len(str(result).splitlines()) > 5
    assert "GiB" in str(result)
    page = result._repr_html_()
    assert page.count("<table>") == page.count("</table>") > 0
    assert "http" not in page
    assert hasattr(result, "__rich__")


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = vramplan.nonsense
    assert set(vramplan.__all__) <= set(dir(vramplan))


def test_the_surface_uses_no_torch_and_no_numpy():
    code = (
        "import sys, vramplan\n"
        "assert not [name for name in sys.modules if name.startswith('vramplan.') and name != 'vramplan.version']\n"
        f"print(vramplan.fit({RUN!r}))\n"
        "assert not {'torch', 'numpy', 'transformers', 'deepspeed'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "FITS" in done.stdout
