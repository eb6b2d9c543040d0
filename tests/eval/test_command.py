"""A folder holds the rows of one kind of run."""

import pytest

from mdkv_vllm.eval.command import check_same_run


def test_rows_of_another_run_are_not_mixed_in(tmp_path):
    description = {"model": "some", "seed": 0}
    check_same_run(tmp_path / "out", description)
    check_same_run(tmp_path / "out", description)
    with pytest.raises(ValueError, match="with seed 0, not 1; name another folder"):
        check_same_run(tmp_path / "out", description | {"seed": 1})
