"""tools/compare_scores.py: exported models score as `python rm.py` does, in every call.

The installed transformers is tested; another version is compared by hand, with the program itself.
"""

import pytest

from tools import compare_scores


@pytest.mark.parametrize(
    "model_type, kind", compare_scores.KINDS, ids=map("-".join, compare_scores.KINDS)
)
def test_every_call_gives_the_score_of_rm(model_type, kind, tmp_path):
    compare_scores.write_models(tmp_path, model_type, kind)
    rows = [{"prompt": text, "response": " a"} for text in compare_scores.PROMPTS]
    assert compare_scores.scores_here(tmp_path, rows).std() > 0.05
    found = compare_scores.differences(tmp_path, model_type)
    assert len(found) == 8 and max(found.values()) < 3e-5, found
