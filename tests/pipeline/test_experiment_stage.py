"""The stage experiment is planned on a sample that may lack small domains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modicum.core.errors import UserError
from modicum.data.curate import CurateConfig, curate
from modicum.pipeline.stages.experiment import Section, _study


def test_domains_that_the_sample_lacks_are_left_out_of_the_plan_alone(tmp_path: Path) -> None:
    with open(tmp_path / "pool.jsonl", "w") as file:
        for i in range(60):
            domain = ("sea", "law")[i % 2]
            file.write(json.dumps({"text": f"{domain} {i} " * 30, "domain": domain}) + "\n")
    config = CurateConfig(steps=["normalise"], vocab_size=300, heldout=0.3)
    folders = {"pool": str(curate(str(tmp_path / "pool.jsonl"), tmp_path / "out", config).folder)}
    section = Section(
        tokens=1024.0, batch_tokens=256.0, sequence_length=64, target=["law", "moon"], pool=["sea", "moon"]
    )
    small = section.model_copy(update={"parameters": 60_000.0})
    planned = _study(small, folders, tmp_path / "plan", 0, None, sample=True)
    assert set(planned.experiment.setting.domains) == {"sea"}
    assert set(planned.experiment.setting.target) == {"law"}
    with pytest.raises(UserError, match="moon"):
        _study(small, folders, tmp_path / "run", 0, None)
