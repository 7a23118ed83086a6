"""The package stays easy to find one's way in: folders of few files, and files of one topic."""

from collections import Counter
from pathlib import Path

import mesa_train

PACKAGE = Path(mesa_train.__file__).parent
SOURCES = ("*.py", "*.h", "*.cpp")


def test_no_folder_has_more_than_24_files():
    folders = {path.parent for pattern in SOURCES for path in PACKAGE.rglob(pattern)}
    counts = {str(f): sum(len(list(f.glob(pattern))) for pattern in SOURCES) for f in folders}
    assert not {folder: count for folder, count in counts.items() if count > 24}


def test_no_file_is_longer_than_400_lines():
    lengths = {
        str(p): len(p.read_text().splitlines())
        for p in PACKAGE.rglob("*")
        if p.suffix in (".py", ".cpp", ".h")
    }
    assert not {path: length for path, length in lengths.items() if length > 400}


def test_no_two_test_files_have_one_name():
    """pytest imports a test file by its name alone."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]
