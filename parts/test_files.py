"""Files are replaced as a whole or not at all."""

import pytest

from parts.files import replacing


def test_file_is_replaced_when_all_of_it_is_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with replacing(file) as part:
        part.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("is_begun", [False, True])
def test_file_is_as_it_was_after_an_error(error, is_begun, tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(error), replacing(file) as part:
        if is_begun:
            part.write_text("half")
        raise error
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
