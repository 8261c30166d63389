"""Which checkpoint is taken up, and what becomes of an earlier run's."""

from hov2.checkpoint import newest_checkpoint, set_aside


def test_an_earlier_run_is_set_aside(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "metrics.jsonl").write_text("old")
    set_aside(tmp_path)
    assert (tmp_path / "earlier-1" / "metrics.jsonl").read_text() == "old" and newest_checkpoint(tmp_path) is None
    set_aside(tmp_path)
    assert not (tmp_path / "earlier-2").exists()


def test_an_unfinished_checkpoint_is_not_taken(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-20.unfinished"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path).name == "checkpoint-10"
    assert newest_checkpoint(tmp_path / "nowhere") is None
