"""A report goes to other processes as JSON and comes back as it was."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from irq_convert.jobs.common.result import pack, unpack
from irq_convert.jobs.merge.check_layers import LayerCheck
from irq_convert.jobs.merge.report import LogitsCheck, MergedLayer, MergeReport
from irq_convert.jobs.quantize.report import QuantizeReport, WorstTensor

CONVERTED = QuantizeReport(
    out="out",
    decided_by="the class",
    bytes_in=3,
    bytes_out=2,
    weights=7,
    quantized_weights=5,
    bits_per_weight=4.25,
    entropy_plain=0.1 + 0.2,
    entropy=float("inf"),
    relative_error=1e-300,
    worst=(WorstTensor("a", "nf4", 0.5), WorstTensor("b", "nf3", 0.25)),
    seconds=0.0,
    kept={"an embedding": 2},
)
MERGED = MergeReport(
    to="irq",
    out="out",
    kind=None,
    base_sha256="0" * 64,
    adapter_sha256=None,
    bytes_in=1,
    bytes_out=2,
    dtypes={"bfloat16": 3},
    layers=(
        MergedLayer("a", "tau", check=LayerCheck("a", 0.5, None)),
        MergedLayer("b", "requantized", survived=0.75, change=0.01),
    ),
    saved=("lm_head.weight",),
    tau={"stored": {"uint8": {"max": None, "rms": 0.5}}},
    logits=LogitsCheck(0.5, 0.25, None, "a reason"),
)


@pytest.mark.parametrize("report", [CONVERTED, MERGED, replace(MERGED, layers=(), saved=())])
def test_reports_come_back(report: QuantizeReport | MergeReport) -> None:
    data = pack(report)
    json.loads(data)
    assert unpack(type(report), data) == report
