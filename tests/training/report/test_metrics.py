import numpy as np
import pytest
import sklearn.metrics

from training.report import metrics, tables

NAMES = ["cat", "dog", "fox"]
# Of four images; the third is taken for a dog.
SCORES = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.0, 0.9, 0.1], [0.1, 0.3, 0.6]])
LABELS = np.array([0, 1, 2, 2])


def test_top_k_by_hand():
    assert metrics.top_k(SCORES, LABELS, 1) == 0.75
    assert metrics.top_k(SCORES, LABELS, 2) == 1
    assert metrics.top_k(SCORES, LABELS, 5) == 1
    assert metrics.top_k(np.zeros((2, 3)), np.array([0, 2]), 1) == 0.5


def test_top_k_and_the_confusion_matrix_are_those_of_sklearn(rng):
    scores, labels = rng.normal(size=(200, 12)), rng.integers(12, size=200)
    for k in (1, 3, 5):
        expected = sklearn.metrics.top_k_accuracy_score(labels, scores, k=k, labels=range(12))
        assert metrics.top_k(scores, labels, k) == pytest.approx(expected)
    expected = sklearn.metrics.confusion_matrix(labels, scores.argmax(1), labels=range(12))
    assert np.array_equal(metrics.confusion_matrix(scores, labels), expected)


def test_accuracy_and_precision_of_each_class(rng):
    assert metrics.confusion_matrix(SCORES, LABELS).tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert metrics.per_class(np.array([[3, 1, 0], [0, 0, 0], [0, 0, 0]]), NAMES) == [
        {"name": "cat", "images": 4, "accuracy": 0.75, "precision": 1.0, "f1": 6 / 7},
        {"name": "dog", "images": 0, "accuracy": None, "precision": 0.0, "f1": 0.0},
        {"name": "fox", "images": 0, "accuracy": None, "precision": None, "f1": None},
    ]
    scores, labels = rng.normal(size=(200, 3)), rng.integers(3, size=200)
    rows = metrics.per_class(metrics.confusion_matrix(scores, labels), NAMES)
    predicted = scores.argmax(1)
    expected = sklearn.metrics.precision_recall_fscore_support(labels, predicted)
    assert [row["precision"] for row in rows] == pytest.approx(expected[0])
    assert [row["accuracy"] for row in rows] == pytest.approx(expected[1])
    assert [row["f1"] for row in rows] == pytest.approx(expected[2])


def test_the_pairs_that_are_confused_most():
    matrix = np.array([[9, 1, 0], [4, 5, 2], [0, 0, 0]])
    expected = [
        {"label": "dog", "prediction": "cat", "images": 4, "of": 11},
        {"label": "dog", "prediction": "fox", "images": 2, "of": 11},
        {"label": "cat", "prediction": "dog", "images": 1, "of": 10},
    ]
    assert metrics.most_confused(matrix, NAMES, 9) == expected
    assert metrics.most_confused(matrix, NAMES, 2) == expected[:2]
    assert metrics.most_confused(np.eye(3, dtype=int), NAMES, 9) == []


def test_calibration_error_by_hand():
    # Two bins, (0, 0.5] and (0.5, 1]: one image of confidence 0.5 that is wrong; three of 0.7, 0.8 and 0.9, one wrong.
    scores = np.array([[0.5, 0.3, 0.2], [0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.0, 0.9, 0.1]])
    labels = np.array([1, 0, 1, 2])
    expected = 1 / 4 * 0.5 + 3 / 4 * abs(2 / 3 - 0.8)
    assert metrics.calibration_error(scores, labels, bins=2) == pytest.approx(expected)
    sure = np.eye(3)[[0, 1, 2]]
    assert metrics.calibration_error(sure, np.array([0, 1, 2])) == 0
    assert metrics.calibration_error(sure, np.array([1, 2, 0])) == 1


def test_the_worst_mistakes_are_the_most_confident():
    scores = np.array([[0.6, 0.4], [0.1, 0.9], [0.2, 0.8], [0.9, 0.1]])
    labels = np.array([1, 0, 1, 0])
    assert metrics.worst_mistakes(scores, labels, 5).tolist() == [1, 0]
    assert metrics.worst_mistakes(scores, labels, 1).tolist() == [1]
    assert metrics.worst_mistakes(scores, scores.argmax(1), 5).tolist() == []


def test_all_measures_at_once():
    found = metrics.measures(SCORES, LABELS, NAMES)
    assert (found["images"], found["top1"], found["top5"]) == (4, 0.75, 1)
    assert [row["name"] for row in found["per_class"]] == NAMES


def test_a_table_is_markdown():
    assert tables.table(["class", "images"], [["cat|dog", 12], ["fox", None]]).splitlines() == [
        "| class    | images |",
        "| -------- | -----: |",
        r"| cat\|dog |     12 |",
        "| fox      |        |",
    ]
