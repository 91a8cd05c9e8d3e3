"""bench_train.py times train.py's own step, and the formula for its memory holds."""
import json

import pytest

from conftest import TINY, with_model


@pytest.mark.parametrize("settings", [
    ("--dtype=float32", "--dropout=0.1", "--bias=True"),
    ("--dtype=bfloat16", "--dropout=0.0", "--optimizer=muon", "--gradient_accumulation_steps=2")])
def test_memory_is_as_the_formula_says(trained, tmp_path, settings):
    printed = trained.run("bench_train.py", *TINY, "--n_embd=64", *settings, "--steps=2",
                          f"--json={tmp_path}/train.json")
    record, = json.loads((tmp_path / "train.json").read_text())
    assert set(record["parts"]) == {"data", "forward", "backward", "optimizer"} and "a step:" in printed
    assert 0 < sum(record["parts"].values()) and record["flops_per_second"] > 0
    for part, measured in record["memory_bytes"].items():
        assert record["memory_bytes_by_formula"][part] == pytest.approx(measured, rel=0.1), part
    assert not (trained.folder / "out.1").exists()  # the run in out/ is untouched
    trained.run("plot.py", "--what=train", f"--json={tmp_path}/train.json", f"--file={tmp_path}/train.png")
    assert (tmp_path / "train.png").stat().st_size > 1000


def test_errors(trained):
    assert "steps must be at least 1" in trained.fails("bench_train.py", "--steps=0")
    assert "expects int" in trained.fails("bench_train.py", "--batch_size=many")
    assert "nonsense" in trained.fails("bench_train.py", "--nonsense=1")


def test_a_run_that_goes_on_with_larger_steps(trained):
    printed = trained.run("bench_train.py", "--init_from=resume", "--batch_size=32", "--steps=1")
    assert "a step: " in printed


def test_parameters_without_a_gradient(trained, tmp_path):
    line = "        self.apply(self._init_weights)\n"
    project = with_model(tmp_path, trained, (line, f"{line}        self.wpe.weight.requires_grad_(False)\n"))
    assert "a step: " in project.run("bench_train.py", *TINY, "--steps=1")
    printed = project.run("verify_gradients.py", "--depths=2,4", "--steps=1")
    assert "\nlm_head" not in printed and "\nwpe.weight" not in printed and "FAIL" not in printed
