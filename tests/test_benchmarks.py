"""The benchmark for GPUs runs without one: the same code, small sizes."""

import json

from benchmarks import gpu


def test_gpu_benchmark_reports_rates_and_the_gradient_of_eager(tmp_path, capsys):
    gpu.main(["--device", "cpu", "--tiny", "--no-compile", "--out", str(tmp_path)])

    said = capsys.readouterr().out
    assert "| workload | method | steps per s |" in said and str(tmp_path / "gpu.json") in said
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert set(rows) == {"machine", "work", "rate", "one step", "memory", "peer"}
    workloads = [row["workload"] for row in rows["work"]]
    rates = {(row["workload"], row["method"]): row for row in rows["rate"]}
    assert len(set(workloads)) == 2
    for workload in workloads:
        assert rates[workload, "eager"]["steps per s"] > 0
        assert rates[workload, "TF32"]["difference"] < 1e-3  # on a CPU it is float32
    for (_, method), row in rates.items():
        if method in gpu.FLOAT32 and "failed" not in row:  # a CUDA graph fails without a GPU
            assert row["difference"] < 1e-3
    for row in rows["peer"]:
        assert row["difference"] < 1e-3
