"""The bench, at sizes that a CPU does in seconds."""

import csv

import pytest
import torch

from extras import bench


def read(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_bench_has_a_row_for_each_part(tmp_path, capsys):
    bench.main(["--quick", "--device", "cpu", "--csv", str(tmp_path / "bench.csv")])
    names = " ".join(row["name"] for row in read(tmp_path / "bench.csv"))
    for part in ("default network, 128 x 128: step", "quantizer and QPM", "loader",
                 "paper's network", "nearest codeword", "QPM", "loop over codes"):
        assert part in names
    assert "failed" not in capsys.readouterr().out


def test_a_table_that_cannot_be_written_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--quick", "--device", "cpu", "--csv", str(tmp_path / "none" / "bench.csv")])
    assert "bench.csv'; allow it, or change --csv\n" in capsys.readouterr().err


def test_the_loop_over_codes_draws_from_the_same_distribution():
    torch.manual_seed(0)
    codebook = torch.nn.functional.normalize(torch.randn(8, 3), dim=1)
    drawn = bench.plain_perturb(torch.zeros(100_000, dtype=torch.long), codebook, 0.7)
    expected = bench.qpm.transition_rows(torch.tensor([0]), codebook, 0.7)[0]
    assert torch.allclose(drawn.bincount(minlength=8) / 100_000, expected, atol=0.01)
