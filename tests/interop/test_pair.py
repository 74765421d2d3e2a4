"""Export of a pair: what cannot be exported is refused, and no id of the tokenizer gets lost."""
import numpy as np
import pytest

import convert
from inputs import tokenizer
from interop.tokenizer_files import tokenizer_files
from tests.helpers.encoders import untrained_run

LIT = {"objective": "lit", "init_encoder": "random"}
REFUSED = [
    ({}, "transformers", "is a run of --objective openvision2, which has no text encoder"),
    (LIT, "transformers", "was trained with --image-pool attention, for which"),
    (LIT | {"image_pool": "mean"}, "transformers", "export the pair to open_clip"),
    (LIT | {"image_pool": "map", "cls_token": True}, "transformers", "without --cls-token"),
    (LIT | {"image_pool": "map"}, "timm", "is written for transformers or open_clip"),
    (LIT | {"image_pool": "map", "gated_attention": True}, "open_clip", "has gated attention"),
    ({"objective": "siglip"}, "open_clip", "only pairs of lit and clip can be exported"),
]


@pytest.mark.parametrize("changes, library, message", REFUSED)
def test_a_pair_that_no_class_holds_is_refused(changes, library, message, tmp_path, capsys):
    run, out = str(tmp_path / "run"), tmp_path / "out"
    untrained_run(run, **changes)
    assert convert.main(["export", run, "--to", library, "--pair", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()


def test_rows_are_a_permutation_and_eos_has_the_highest_id_of_a_token():
    tok = tokenizer.train_vocab(["a red circle"], 120)
    files = tokenizer_files(tok, 128, 16)
    assert sorted(files.rows) == list(range(128))
    assert files.ids == {"pad": 0, "bos": 1, "eos": len(tok) - 1}
    assert np.array_equal(files.rows[[0, 1, len(tok) - 1]], [0, 1, 2])
