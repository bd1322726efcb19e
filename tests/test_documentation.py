"""Tooltips, locales and help pages cover every node, input and output, and name nothing that is gone.

English texts come from the schemas: `python3 scripts/update_schemas.py` writes them.
"""

import json
import re
import shutil
from urllib.parse import unquote

import folder_paths
import node_schemas
import pytest
from app.custom_node_manager import CustomNodeManager

from comfy_process import REPOSITORY

SCHEMAS = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in node_schemas.nodes()}
ENGLISH = node_schemas.english()
LOCALES = {
    path.parent.name: json.loads(path.read_text(encoding="utf-8"))
    for path in REPOSITORY.glob("locales/*/nodeDefs.json")
}
HELP = REPOSITORY / "web" / "docs"
CHINESE = re.compile("[\u4e00-\u9fff]")
PAGES = ("Training",)  # of no node
LINK = re.compile(r"\]\(<?([^)>#]+)>?(?:#[^)]*)?\)")

# The editor compiles locale texts as messages, in which these are syntax.
MESSAGE_SYNTAX = re.compile(r"[{}@|]")

each_node = pytest.mark.parametrize("node_id", SCHEMAS)
each_language = pytest.mark.parametrize("language", ["en", "zh"])


def help_page(node_id: str, language: str) -> str:
    """The page that the editor shows in a language."""
    path = HELP / f"{node_id}.md" if language == "en" else HELP / node_id / f"{language}.md"
    return path.read_text(encoding="utf-8")


def texts(value) -> list[str]:
    """Every string in nested dictionaries."""
    return [value] if isinstance(value, str) else [text for entry in value.values() for text in texts(entry)]


@each_node
def test_schema_explains_everything(node_id):
    schema = SCHEMAS[node_id]
    assert schema.display_name and schema.description.endswith(".")
    assert schema.search_aliases and all(alias == alias.lower() for alias in schema.search_aliases)
    for entry in (*schema.inputs, *schema.outputs):
        assert entry.tooltip and entry.tooltip.endswith("."), entry.id
    assert all(text.isascii() for text in texts(ENGLISH[node_id]))


def test_english_locale_is_what_the_schemas_say():
    assert LOCALES["en"] == ENGLISH, "Run python3 scripts/update_schemas.py."


@each_language
def test_locales_have_every_entry_and_no_stale_one(language):
    def keys(value, path=()):
        if isinstance(value, str):
            return {path}
        return {key for name, entry in value.items() for key in keys(entry, (*path, name))}

    assert keys(LOCALES[language]) == keys(ENGLISH)


@each_language
def test_locale_texts_are_filled_and_plain(language):
    for text in texts(LOCALES[language]):
        assert text.strip() == text != "" and not MESSAGE_SYNTAX.search(text), text


@each_node
def test_chinese_is_translated_and_keeps_the_numbers(node_id):
    chinese, english = LOCALES["zh"][node_id], ENGLISH[node_id]
    assert CHINESE.search(chinese["description"])
    for kind in ("inputs", "outputs"):
        for key, entry in chinese[kind].items():
            assert CHINESE.search(entry["tooltip"]), (kind, key)
            numbers = [re.findall(r"\d+\.\d+|\d+", node[kind][key]["tooltip"]) for node in (chinese, english)]
            assert sorted(numbers[0]) == sorted(numbers[1]), (kind, key)


def test_comfyui_reads_the_locales(tmp_path, monkeypatch):
    pack = tmp_path / "custom_nodes" / "pack"
    shutil.copytree(REPOSITORY / "locales", pack / "locales")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "custom_nodes", ([str(pack.parent)], set()))
    translations = CustomNodeManager().build_translations()
    assert set(translations) == set(LOCALES) == {"en", "zh"}
    for language, content in translations.items():
        assert content["nodeDefs"] == LOCALES[language]
        roots = {schema.category.split("/")[0] for schema in SCHEMAS.values()}
        assert set(content["nodeCategories"]) == roots


@each_language
@each_node
def test_help_page_names_every_input_and_output(node_id, language):
    page, schema = help_page(node_id, language), SCHEMAS[node_id]
    assert page.startswith(f"# {LOCALES[language][node_id]['display_name']}\n")
    for entry in schema.inputs:
        assert f"| `{entry.id}` |" in page, entry.id
    for entry in schema.outputs:
        assert f"| `{node_schemas.output_name(entry)}` |" in page, node_schemas.output_name(entry)
    assert CHINESE.search(page) if language == "zh" else page.isascii()


@each_language
@each_node
def test_help_page_states_the_limits_of_the_schema(node_id, language):
    page = help_page(node_id, language)
    for entry in node_schemas.snapshot()[node_id]["inputs"]:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{entry['id']}` |"))
        for name in ("default", "min", "max"):
            # Texts, which do not fit into a row, are in a block of their own.
            place = page if entry["type"] == "STRING" else row
            assert name not in entry or re.search(rf"(?<![\w.]){re.escape(str(entry[name]))}(?![\w.])", place), row
        assert all(f"`{option}`" in row for option in entry.get("options", ())), row


def test_no_help_page_is_stale():
    pages = {path.relative_to(HELP).as_posix() for path in HELP.rglob("*") if path.is_file()}
    assert pages == {name for topic in (*SCHEMAS, *PAGES) for name in (f"{topic}.md", f"{topic}/zh.md")}


@pytest.mark.parametrize(
    "name",
    ["README.md", "SECURITY.md", "THIRD_PARTY.md", "CHANGELOG.md", "web/docs/Training.md", "web/docs/Training/zh.md"],
)
def test_links_between_files_resolve(name):
    path = REPOSITORY / name
    links = LINK.findall(path.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (path.parent / unquote(link)).exists()]
    assert broken == []


def test_readme_names_every_node():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert [schema.display_name for schema in SCHEMAS.values() if f"**{schema.display_name}**" not in readme] == []
