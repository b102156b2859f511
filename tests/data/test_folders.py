import pytest

from data.errors import AudioError, DataError
from data.folders import contents, find_folder, leave_out_bad


def test_a_corpus_is_found_in_a_folder_above_it(tmp_path):
    (tmp_path / "a" / "b" / "wav8k" / "min").mkdir(parents=True)
    for root in (tmp_path, tmp_path / "a", tmp_path / "a" / "b"):
        assert find_folder(root, "wav8k/min") == tmp_path / "a" / "b" / "wav8k" / "min"
    with pytest.raises(DataError, match="looked for wav16k/min .*there is a$"):
        find_folder(tmp_path, "wav16k/min")
    (tmp_path / "c" / "wav8k" / "min").mkdir(parents=True)
    with pytest.raises(DataError, match="more than one .*a/b/wav8k/min, .*c/wav8k/min"):
        find_folder(tmp_path, "wav8k/min")
    with pytest.raises(DataError, match="no such folder"):
        find_folder(tmp_path / "none", "wav8k/min")


def test_contents_are_listed_in_short(tmp_path):
    assert contents(tmp_path) == "nothing"
    for number in range(10):
        (tmp_path / str(number)).touch()
    assert contents(tmp_path) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


def row_of(number):
    if number < 0:
        raise AudioError(f"{number}.wav: is empty")
    return {"number": number}


def test_a_few_bad_items_are_left_out(caplog):
    items = [*range(5), *range(-10, 0)]
    assert leave_out_bad(items, row_of, where="here") == [{"number": number} for number in range(5)]
    assert "left out: -10.wav: is empty" in caplog.text and "here: 10 of 15 recordings left out" in caplog.text
    with pytest.raises(DataError, match="here: 11 of 16 files cannot be used, the first: -11.wav: is empty"):
        leave_out_bad([*range(5), *range(-11, 0)], row_of, where="here", what="files")
    assert len(leave_out_bad([*range(1500), *range(-15, 0)], row_of, where="here")) == 1500
    with pytest.raises(DataError, match="1 of 1"):
        leave_out_bad([-1], row_of, where="here")
