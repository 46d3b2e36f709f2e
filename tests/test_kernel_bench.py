"""`bench kernel` on a CPU: every row runs, on tiny shapes, and one that fails does not stop the others."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from swapattn import kernel_bench, kernel_lab
from swapattn.cli import main
from swapattn.errors import UsageError
from swapattn.kernel_bench import GROUPS, Target, measure_kernels
from swapattn.kernel_lab import Shape


def test_every_row_runs_and_stands_in_the_table():
    found = measure_kernels(device="cpu")
    assert {row["group"] for row in found.rows} == set(GROUPS)
    failed = {row["row"]: row["error"] for row in found.rows if row["error"]}
    assert failed == {"extra memory of forward + backward": "UsageError: peak memory is measured on a GPU only"}
    for row in found.rows:
        if row["error"] is None:
            assert row["milliseconds"] > 0
            assert row["figure"] > 0
            assert not [ms for ms in row["peers"].values() if isinstance(ms, str)]
    assert found.errors.keys() == {"swapattn", "swapattn step", "math"}
    assert max(found.errors.values()) < 1e-5
    lines = found.to_table().splitlines()
    assert [line.split("  ")[0].strip()[:20] for line in lines[1 : 1 + len(found.rows)]] == [
        row["row"][:20].strip() for row in found.rows
    ]


def test_the_command_prints_one_json_document():
    result = CliRunner().invoke(main, ["bench", "kernel", "--rows", "gqa,decode", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert {row["group"] for row in data["rows"]} == {"gqa", "decode"}
    assert data["bandwidth"] > 0
    assert data["versions"]["torch"] == torch.__version__


def test_a_failing_kernel_is_a_row_of_its_own(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no image for this device\nmore")

    monkeypatch.setattr(kernel_bench, "merged_local_attention", broken)
    rows = measure_kernels(("decay", "both"), device="cpu").rows
    errors = [row["error"] for row in rows]
    assert errors == [None, None] + 2 * ["RuntimeError: no image for this device"]


def test_a_wrong_peer_is_told_and_not_timed(monkeypatch):
    monkeypatch.setattr(kernel_lab, "_backend", lambda _: lambda q, k, v, decay: (q + k + v) * q.element_size())
    found = measure_kernels(("forward",), device="cpu")
    assert found.errors["math"] == pytest.approx(0.5)
    assert all(row["peers"] == {} for row in found.rows)


def test_without_peers_only_the_kernels_are_timed():
    table = measure_kernels(["forward", "decode"], device="cpu", peers=False)
    assert set(table.errors) == {"swapattn", "swapattn step"}
    yardsticks = {"softmax over 512", "state scaled in place"}
    assert {name for row in table.rows for name in row["peers"]} == yardsticks


def test_after_the_time_is_up_rows_are_told_as_not_run():
    rows = measure_kernels(("gqa",), device="cpu", seconds=0).rows
    assert [row["error"] for row in rows] == 2 * ["not run: more than 0 s had passed"]


def test_ctrl_c_leaves_what_was_measured(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(kernel_bench, "merged_local_attention", interrupted)
    rows = measure_kernels(("decay", "both", "gqa"), device="cpu").rows
    assert [row["error"] for row in rows] == [None, None] + 4 * ["not run: interrupted"]


def test_the_authors_kernels_are_called_with_their_layout_slopes_and_scale():
    """Their function, as its paper has it, in plain PyTorch."""

    def attend(q, k, v, slopes):
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        decays = torch.exp(-slopes[:, None, None] * distance).tril()
        return (q @ k.transpose(2, 3) * decays) @ v

    q, k, v = torch.randn(3, 2, 20, 4, 8).unbind(0)
    decay = -torch.rand(4)
    torch.testing.assert_close(
        kernel_lab._heads_first(attend, q, k, v, decay), kernel_lab.own_attention(q, k, v, decay)
    )


def test_unknown_rows_are_refused():
    with pytest.raises(UsageError, match="unknown rows backwards: choose from forward"):
        measure_kernels(("backwards",), device="cpu")


def test_floors_count_what_must_move_once():
    # 64 x 1K, H=32, D=128 in bf16: four tensors of 512 MiB forward, seven more backward
    shape = Shape(64, 1024)
    assert shape.bytes(2, backward=False) == 4 * 2**29
    assert shape.bytes(2, backward=True) == 11 * 2**29
    # with 8 KV heads k, v, dk, dv are a quarter
    assert Shape(64, 1024, 32, 8).bytes(2, backward=True) == 5 * 2**29 + 6 * 2**27


def test_shares_are_least_and_ratios_most():
    assert Target(0.9).reached(0.95)
    assert not Target(0.9).reached(0.85)
    assert Target(1.15, "ratio").reached(1.1)
    assert not Target(1.15, "ratio").reached(1.2)
    assert Target(36, "us").text(36.0) == "36.0 us"
