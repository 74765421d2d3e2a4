"""A run that is killed often ends as the uninterrupted one, bit for bit."""
from tests.helpers.kills import check_kills, complete_run

NUM_STEPS, NUM_KILLS = 60, 20
STAGES = (f"resolution=16 steps={NUM_STEPS // 2} batch=8 lr=1e-3 warmup=1, "
          f"resolution=24 steps={NUM_STEPS // 2} batch=8 lr=1e-3 warmup=1")
FLAGS = ("--stages", STAGES, "--eval-every", "10")


def test_killed_twenty_times(cache, tmp_path):
    complete_run(cache, tmp_path / "uninterrupted", *FLAGS)
    check_kills(cache, tmp_path / "run", tmp_path / "uninterrupted", NUM_KILLS, NUM_STEPS, *FLAGS)
