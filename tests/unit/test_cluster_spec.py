"""A wrong file of cluster/ is refused with all that is wrong, each with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymill.cluster.spec import load_cluster
from raymill.errors import InputError


def test_all_mistakes_of_a_file_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "pyproject.toml").write_text("[tool.raymill]\n")
    written = "kind: local\nkeep_readdy: true\nobject_store_mb: 1\nnodes:\n  - {num_cpus: 2, num_gpus: 1}\n  - {num_cpu: 2}\n"
    (tmp_path / "cluster" / "mine.yaml").write_text(written)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refused:
        load_cluster("mine")
    found = {problem.where.rpartition(" ")[2]: problem for problem in refused.value.problems}
    assert set(found) == {"keep_readdy", "object_store_mb", "nodes.0.num_gpus", "nodes.1.num_cpus", "nodes.1.num_cpu"}
    assert "'keep_ready'" in found["keep_readdy"].fix
    assert "'num_cpus'" in found["nodes.1.num_cpu"].fix
    with pytest.raises(InputError, match="Did you mean 'mine'"):
        load_cluster("min")
