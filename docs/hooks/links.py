"""Links that leave docs/, as they do on GitHub, lead to pages of the site: a file they name becomes one."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()[^()\s#:]+(?=[#)])")
AS_THEY_ARE = {".md", ".png", ".svg"}
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml"}


def on_config(config):
    """Anchors of headings are those of GitHub."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")


def on_files(files, config):
    """Adds the files outside docs/ that the nav or a page names, and those that they name in turn."""

    def add(path):
        if files.get_file_from_path(site_path(path)) is None:
            file = ROOT / path
            how = {"abs_src_path": file} if file.suffix in AS_THEY_ARE else {"content": shown(file)}
            files.append(File.generated(config, site_path(path), **how))
            follow(files.get_file_from_path(site_path(path)))

    def follow(page):
        if page.is_documentation_page():
            for target in LINK.findall(page.content_string):
                if path := repository_path(page, target):
                    add(path)

    for page in list(files):
        follow(page)
    for path in re.findall(r"[\w/]+\.md", str(config.nav)):
        if (ROOT / path).is_file():
            add(path)


def on_page_markdown(markdown, page, config, files):
    """Turns links to files of the repository into links to where they are on the site."""

    def moved(link):
        path = repository_path(page.file, link[0])
        return posixpath.relpath(site_path(path), posixpath.dirname(page.file.src_uri)) if path else link[0]

    return LINK.sub(moved, markdown)


def repository_path(page, target):
    """The file of the repository that a link of a page leads to; None if there is none."""
    folder = posixpath.dirname(page.src_uri if page.generated_by else posixpath.join("docs", page.src_uri))
    path = posixpath.normpath(posixpath.join(folder, target))
    return path if (ROOT / path).is_file() else None


def site_path(path):
    """docs/ is the root of the site. Other files keep their place, code as a page that shows it."""
    if path == "README.md":
        return "index.md"
    path = path.removeprefix("docs/")
    return path if posixpath.splitext(path)[1] in AS_THEY_ARE else f"{path}.md"


def shown(file):
    return f"# {file.name}\n\n```{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text()}```\n"
