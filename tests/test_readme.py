from pathlib import Path

from jaxserve.cli.options import options_table

README = Path(__file__).parent.parent / "README.md"


def test_the_options_table_is_the_generated_one() -> None:
    assert options_table().strip() in README.read_text("utf-8")


def test_every_linked_file_exists() -> None:
    text = README.read_text("utf-8")
    links = [part.partition(")")[0] for part in text.split("](")[1:]]
    files = [link for link in links if not link.startswith(("http", "#"))]
    assert files
    assert not [link for link in files if not (README.parent / link).exists()]
