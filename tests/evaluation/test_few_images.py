"""Readers of features where there are few images, and which images are measured."""
import numpy as np

from config import Config
from evaluation import linear_probe, neighbors, run_data, tasks


def make_tasks(classes: np.ndarray, test_classes: np.ndarray) -> tasks.Tasks:
    return tasks.Tasks(["label"], np.array([2]), classes[:, None], test_classes[:, None])


def test_a_probe_on_wide_features_of_few_images_reads_the_label():
    rng = np.random.default_rng(0)
    classes, test_classes = rng.integers(0, 2, (2, 300)).astype(np.int32)
    direction = rng.normal(size=3000)
    train = np.outer(2 * classes - 1, direction) + rng.normal(size=(300, 3000))
    test = np.outer(2 * test_classes - 1, direction) + rng.normal(size=(300, 3000))
    train[:20] = train[0]  # the same image again: fewer dimensions than images
    classes[:20] = classes[0]
    features = linear_probe.flatten_features(train, test)
    predictions = linear_probe.linear_probe(*features, make_tasks(classes, test_classes))
    assert features[0].shape[1] < 300
    assert (predictions[:, 0] == test_classes).mean() > 0.98


def test_the_nearest_image_is_one_that_has_the_label():
    classes = np.array([-1, 0, 1], np.int32)
    train, test = np.array([[0.0], [1.0], [5.0]]), np.array([[0.1]])
    predictions = neighbors.nearest_image(train, test, make_tasks(classes, np.array([0])))
    assert predictions.tolist() == [[0]]


def test_the_runs_own_folder_in_another_spelling_keeps_its_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    cfg = Config(data="photos", val_samples=500)
    for spelling in ("photos/", "./photos", str(tmp_path / "photos")):
        assert run_data.override_config(cfg, {"data": spelling}, 20).val_samples == 500
    assert run_data.override_config(cfg, {"data": "other"}, 20).val_samples == 20
