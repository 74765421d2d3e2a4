"""Probes and neighbors, on features whose answers are planted and against independent formulas."""
import sys

import jax
import numpy as np
import pytest

from evaluation import attention_probe, labels, linear_probe, neighbors, probe, tasks
from inputs import scenes, sources
from runtime.errors import DataError, MissingExtra

SIZES = (3, 2)


def planted(n: int, width: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features (n,D) and the classes (n,2) of two linear tasks."""
    x = np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)
    return x, np.stack([x[:, :3].argmax(1), (x[:, 3] > 0).astype(int)], 1).astype(np.int32)


def make(train: np.ndarray, test: np.ndarray, sizes: tuple[int, ...] = SIZES) -> tasks.Tasks:
    return tasks.Tasks([f"task {t}" for t in range(len(sizes))], np.array(sizes), train, test)


def test_linear_probe_reads_linear_tasks_and_nothing_from_shuffled_labels():
    (x, y), (z, truth) = planted(600), planted(300, seed=1)
    assert ((linear_probe.linear_probe(x, z, make(y, truth)) == truth).mean(0) > 0.93).all()
    shuffled = make(np.random.default_rng(2).permutation(y), truth)
    accuracy = (linear_probe.linear_probe(x, z, shuffled) == truth).mean(0)
    assert (np.abs(accuracy - (1 / 3, 1 / 2)) < 0.12).all()


def test_images_without_a_label_do_not_count():
    """Half of the images have no label of the second task. Their features say the opposite."""
    (x, y), (z, truth) = planted(800), planted(300, seed=1)
    x[::2, 3] *= -1
    y[::2, 1] = -1
    predictions = linear_probe.linear_probe(x, z, make(y, truth))
    assert (predictions[:, 1] == truth[:, 1]).mean() > 0.93


@pytest.mark.parametrize("task", [0, 1])
def test_logistic_regression_minimizes_the_stated_loss(task):
    """Where the loss is least, its numerical gradient is zero."""
    x, y = planted(200, 5)
    y, l2 = y[:, task], 0.1
    model = linear_probe.fit(linear_probe.make_model(), x.astype(np.float64), y, l2)
    weights = np.concatenate([model.coef_, model.intercept_[:, None]], 1)

    def loss(w):
        logits = x @ w[:, :-1].T + w[:, -1]
        if len(w) == 1:  # two classes have one row of weights
            logits = np.concatenate([0 * logits, logits], 1)
        log_sums = np.log(np.exp(logits).sum(1))
        return (log_sums - logits[np.arange(len(x)), y]).mean() + l2 / 2 * (w[:, :-1] ** 2).sum()
    for index in np.ndindex(weights.shape):
        step = np.zeros_like(weights)
        step[index] = 1e-4
        assert abs(loss(weights + step) - loss(weights - step)) / 2e-4 < 2e-4


def test_strength_is_chosen_on_images_that_do_not_train():
    """With noise alone the strongest regularization is best; on linear tasks a weak one is."""
    (x, y), rng = planted(400, 40), np.random.default_rng(0)
    selection = tasks.selection_rows(len(x), len(x), 0)
    assert 0.1 < selection.mean() < 0.3
    strengths, fit = [], linear_probe.fit

    def record(model, x, classes, l2):
        strengths.append(l2)
        return fit(model, x, classes, l2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_probe, "fit", record)
        linear_probe.logistic_regression(x, y[:, 0], selection, x)
        linear_probe.logistic_regression(x, rng.permutation(y[:, 0]), selection, x)
    assert strengths[:4] == strengths[5:9] == list(linear_probe.L2)
    assert strengths[4] < 0.1 <= strengths[9]


def test_few_images_still_give_predictions():
    """A class that is missing among the training rows, a task with one class among them, and one
    with one class at all."""
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    selection = np.array([False, False, False, False, True, True])
    for classes in ([0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1], [0, 1, -1, -1, -1, -1],
                    [2, 2, -1, -1, 2, -1]):
        predictions = linear_probe.logistic_regression(x, np.array(classes), selection, x)
        assert set(predictions.tolist()) <= set(classes)


def test_attention_probe_reads_the_token_that_holds_the_answer():
    """A mark points out the patch that holds it; the mean of the tokens hardly does."""
    rng = np.random.default_rng(0)

    def sample(n):
        x, place = rng.normal(size=(n, 9, 10)).astype(np.float32), rng.integers(9, size=n)
        y = rng.integers(2, size=n)
        x[:, :, 0] = 0
        x[np.arange(n), place, 0], x[np.arange(n), place, 1] = 3, 2 * y - 1
        return x, y[:, None].astype(np.int32)
    (x, y), (z, truth) = sample(1500), sample(400)
    task = make(y, truth, (2,))
    assert (attention_probe.attention_probe(x, z, task) == truth).mean() > 0.9
    assert (linear_probe.linear_probe(x.mean(1), z.mean(1), task) == truth).mean() < 0.8


def test_mixing_logits_equals_classifying_the_mixture():
    rng = np.random.default_rng(0)
    shapes = {"query": (6, 2), "kernel": (6, 5), "bias": (5,)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    x, expected = rng.normal(size=(4, 7, 6)).astype(np.float32), []
    for t, (start, end) in enumerate(attention_probe.class_columns(SIZES)):
        weights = np.exp(x @ params["query"][:, t] / np.sqrt(6))
        weights /= weights.sum(1, keepdims=True)
        mixture = (weights[..., None] * x).sum(1)
        expected.append(mixture @ params["kernel"][:, start:end] + params["bias"][start:end])
    to_task = attention_probe.class_to_task(SIZES)
    np.testing.assert_allclose(attention_probe.attention_logits(params, x, to_task),
                               np.concatenate(expected, 1), atol=1e-5)


def test_neighbors_are_those_of_brute_force():
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(40, 6)), rng.normal(size=(15, 6))
    one_per_class = make(np.arange(40)[:, None], np.zeros((15, 1), int), (40,))
    predictions = neighbors.nearest_neighbors(*tasks.standardize(x, z), one_per_class)
    scaled = (x - x.mean(0)) / x.std(0)
    for row, prediction in zip((z - x.mean(0)) / x.std(0), predictions[:, 0]):
        cosines = [row @ b / np.linalg.norm(row) / np.linalg.norm(b) for b in scaled]
        assert prediction == int(np.argmax(cosines))
    nearest = [int(np.argmin([np.linalg.norm(row - b) for b in x])) for row in z]
    assert neighbors.nearest_image(x, z, one_per_class)[:, 0].tolist() == nearest
    (x, y), (z, truth) = planted(800, 5), planted(200, 5, seed=1)
    assert (neighbors.nearest_neighbors(x, z, make(y, truth)) == truth).mean() > 0.75


def test_votes_are_weighted_and_counted():
    cosines, classes = np.array([[0.9, 0.88, 0.87, 0.1]]), np.array([[0, 1, 1, 2]])
    assert neighbors.vote(cosines, classes, 3, 1)[0] == 0
    assert neighbors.vote(cosines, classes, 3, 3)[0] == 1
    cosines = np.array([[0.9, 0.5, 0.5, 0.1]])  # one that is much nearer outvotes two
    assert neighbors.vote(cosines, classes, 3, 3)[0] == 0


def test_one_image_per_class_is_recognized_by_what_its_copies_share():
    """Half of the directions are loud, and differ between copies of an image."""
    rng = np.random.default_rng(0)
    own, y = rng.normal(size=(60, 8)), np.arange(60)[:, None]
    rotation = np.linalg.qr(rng.normal(size=(16, 16)))[0]

    def copies(count):
        loud = [2 * rng.normal(size=(60, 8)) for _ in range(count)]
        return np.concatenate([np.concatenate([own, noise], 1) for noise in loud]) @ rotation
    train, test, task = copies(5), copies(1), make(y, y, (60,))
    assert (linear_probe.linear_probe(train, test, task) == y).mean() > 0.9
    means = train.reshape(5, 60, 16).mean(0)
    assert (neighbors.nearest_neighbors(means, test, task) == y).mean() < 0.6


def test_projected_features_keep_their_inner_products(monkeypatch):
    monkeypatch.setattr(linear_probe, "MAX_WIDTH", 32)
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(100, 20)) @ rng.normal(size=(20, 200))).astype(np.float32)
    train, test = linear_probe.flatten_features(x[:80].reshape(80, 10, 20),
                                                x[80:].reshape(20, 10, 20))
    assert train.shape == (80, 20)  # the rank
    np.testing.assert_allclose(test @ train.T, x[80:] @ x[:80].T, atol=0.01)


def test_measure_has_rows_for_readers_and_baselines(encoder):
    names = ("size", "background_color")
    train, test = (labels.select_labels(labels.scene_images(0, split, count), names)
                   for split, count in (("train", 48), ("val", 24)))
    readers = ("pooled", "neighbors")
    rows = probe.measure(encoder, train, test, readers)
    assert set(rows) == {"pooled", "neighbors", "random pooled", "random neighbors",
                         "pixels linear", "pixels neighbors", "pixels nearest", "commonest"}
    assert all(tuple(row) == names for row in rows.values())
    assert rows == probe.measure(encoder, train, test, readers)
    rows = probe.measure(encoder, train, test, ("neighbors",), baselines=False)
    assert set(rows) == {"neighbors"}
    assert len(test.feature_cache) <= 3 and encoder in test.feature_cache


def test_labels_without_a_training_image_do_not_count():
    """A place that is empty in all of them, and a label that all of them share."""
    kind = np.array([["x"]] * 3)
    train = {"color": np.array([["red", ""], ["blue", ""], ["red", ""]]), "kind": kind}
    test = {"color": np.array([["blue", "red"], ["green", "red"], ["", "blue"]]), "kind": kind}
    made = tasks.make_tasks(train, test)
    assert made.names == ["color"] and made.num_classes.tolist() == [2]
    assert made.train.tolist() == [[1], [0], [1]] and made.test.tolist() == [[0], [-1], [-1]]
    with pytest.raises(DataError, match="all training images have the same kind"):
        tasks.make_tasks({"kind": kind}, {"kind": kind})


def test_scene_labels_are_those_of_the_record():
    labeled = labels.scene_images(3, "val", 20)
    for n in range(20):
        record = scenes.sample_scene(3, "val", n)
        places = zip(scenes.PLACES, labeled.labels["place"][n])
        taken = [place for place, text in places if text == "taken"]
        assert taken == [o["place"] for o in record["objects"]]
        colors = [color for color in labeled.labels["color"][n] if color]
        assert colors == [o["color"] for o in record["objects"]]
        assert labeled.labels["word"][n, 0] == (record["word"] or "")


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingExtra, match=r"pip install -e '.\[eval\]'"):
        linear_probe.make_model()


def test_scikit_learn_is_missed_before_the_features_are_computed(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtra):
        probe.measure(None, None, None)


def test_all_copies_of_an_image_select_or_all_train():
    rows = tasks.selection_rows(40, 10, 0).reshape(4, 10)
    assert (rows == rows[0]).all()


def test_an_image_does_not_vote_for_itself_when_the_neighbors_are_chosen():
    """With three labels of ten flipped, it would make one neighbor look perfect."""
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(300, 4)), rng.normal(size=(400, 4))
    answers = (train[:, :1] > 0).astype(np.int32)
    truth = (test[:, :1] > 0).astype(np.int32)
    flipped = rng.random(300) < 0.3
    answers[flipped] = 1 - answers[flipped]
    made = tasks.Tasks(["t"], np.array([2]), answers, truth)
    assert (neighbors.nearest_neighbors(train, test, made) == truth).mean() > 0.78


def test_the_attention_probe_keeps_its_best_round():
    """Labels are random, so that later rounds are worse on the images that select."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 3, 40)).astype(np.float32)
    y = rng.integers(0, 2, (120, 1)).astype(np.int32)
    to_task = attention_probe.class_to_task((2,))
    chosen = tasks.selection_rows(120, 120, 0)[:, None]
    fitted = attention_probe.one_hot(np.where(chosen, -1, y), (2,))
    selecting = attention_probe.one_hot(np.where(chosen, y, -1), (2,))
    params = attention_probe.fit(x, fitted, selecting, to_task, jax.random.key(0))
    logits = attention_probe.batched_logits(params, x, to_task)
    loss = attention_probe.cross_entropy(logits, selecting, to_task)
    assert float(loss[0]) / chosen.sum() < 1.5


def test_training_scenes_of_probes_are_of_no_run():
    of_runs = sources.SceneSource(0, "train")
    seen = {tuple(of_runs.scene(i)["jitter"]) for i in range(3000)}
    images = labels.scene_images(0, "train", 500)
    assert not seen & {tuple(images.source.scene(i)["jitter"]) for i in images.indices}
    assert min(images.indices) > 10**9
