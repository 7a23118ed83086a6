"""CSV files of users, as spreadsheets write them."""

import pytest

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data.table import read_table


def test_a_byte_order_mark_and_further_columns_do_no_harm(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbffile,caption,note\r\na.jpg,"a red, round ball",x\r\n')
    (row,) = read_table(path, ("file", "caption"), "data.train")
    assert row["file"] == "a.jpg"
    assert row["caption"] == "a red, round ball"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfef\x00", "is no CSV file in UTF-8"),
        (b"file;caption\na;b", "lacks file, caption and has 'file;caption'; commas separate"),
        (b"file,caption\n", "has no rows"),
        (b"file,caption\na,b\nc\n", "line 3 has no caption"),
        (b"", "has none"),
    ],
)
def test_a_wrong_table_is_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        read_table(path, ("file", "caption"), "data.train")
    assert str(error.value).startswith("data.train: ")
    assert len(str(error.value).splitlines()) == 1
