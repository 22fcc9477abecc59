"""What pyproject.toml cannot state: the package's page on PyPI is README.md with addresses in place
of paths, because PyPI serves no files of a repository."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def page_of(readme: str, repository: str | None) -> str:
    """README.md for PyPI. repository: the address to which its paths are relative, `Repository` in
    [project.urls]; None: images and links become their text."""

    def absolute(found: re.Match[str]) -> str:
        image, text, path = found.groups()
        if repository is None:
            return text
        return f"{image}[{text}]({repository.rstrip('/')}/{'raw' if image else 'blob'}/HEAD/{path})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)", absolute, readme)


if __name__ == "__main__":  # also for setuptools' build backend
    stated = re.search(r'^Repository = "(.+)"', (HERE / "pyproject.toml").read_text("utf-8"), re.M)
    setup(
        long_description=page_of(
            (HERE / "README.md").read_text("utf-8"), stated[1] if stated else None
        ),
        long_description_content_type="text/markdown",
    )
