"""Pages of the site that are not written by hand: the API reference, and copies of what lies beside the README."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGES = {
    "schemas": "What data and settings look like: settings of every command, the layout of shards, the manifest.",
    "embeddings": "The models: batches, tables, scoring, search, pooling, sharding, collectives.",
    "pipeline": "From data to a trained model: ingest, streaming, training, evaluation, experiments, planning.",
    "jobs": "The command line and the components that start it on clusters.",
}
BESIDE_THE_README = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page a package, with every module of it, and the README and its neighbours."""
    root = Path(config.config_file_path).parent
    for package, subject in PACKAGES.items():
        modules = [module for file in sorted((root / package).rglob("*.py")) if (module := module_of(file, root))]
        text = f"# {package}\n\n{subject}\n\n" + "\n".join(f"::: {module}\n" for module in modules)
        files.append(File.generated(config, f"api/{package}.md", content=text))
    for page, source in BESIDE_THE_README.items():
        text = (root / source).read_text()
        # Links into docs/ are links beside it now; what else lies in the repository is not on the site.
        text = re.sub(r"(\]\(|src=\")docs/", r"\1", text)
        text = re.sub(r"\[([^\]]+)\]\((?:\.\./)?(?:CONTRIBUTING|CHANGELOG)\.md\)", local_link, text)
        text = re.sub(r"\[([^\]]+)\]\((?!https?:|#|[\w/-]+\.(?:md|svg|png))[^)]+\)", r"\1", text)
        files.append(File.generated(config, page, content=text))
    return files


def local_link(link: re.Match[str]) -> str:
    """The name of the page on the site in the place of the file beside the README."""
    return re.sub(r"\((?:\.\./)?(\w+)\.md\)", lambda name: f"({name[1].lower()}.md)", link[0])


def module_of(file: Path, root: Path) -> str | None:
    """Dotted name of a module; None for an ``__init__.py`` that only says what its package is for."""
    parts = file.relative_to(root).with_suffix("").parts
    if parts[-1] != "__init__":
        return ".".join(parts)
    return ".".join(parts[:-1]) if len(file.read_text().splitlines()) > 5 else None
