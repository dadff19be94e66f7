"""What the Luna nodes tell people: tooltips, help pages, locale files. As a server serves them to the front end."""

from __future__ import annotations

import json
import re

import pytest

from bench.comfy_server import ComfyServer
from bench.pack import examples, locales
from bench.pack.__main__ import MODULE, PACK, written
from bench.pack.definitions import Definition, definitions

pytestmark = pytest.mark.comfy

NODES = {
    "LunaModelRouter": "Luna Model Router",
    "LunaConfigGateway": "Luna Config Gateway",
    "LunaLoRAStack": "Luna LoRA Stack",
    "LunaSecondaryModelLoader": "Luna Secondary Model Loader",
    "LunaHostStatus": "Luna Host Status",
    "LunaLoRAValidator": "Luna LoRA Validator",
}


@pytest.fixture(scope="module")
def known(shared: ComfyServer) -> dict[str, Definition]:
    return definitions(json.loads(shared.request("/object_info")))


def test_the_pack_has_these_nodes(known: dict[str, Definition]) -> None:
    ours = {kind: definition.display_name for kind, definition in known.items() if definition.pack == MODULE}
    assert ours == NODES


@pytest.mark.parametrize("kind", NODES)
def test_node_and_all_its_inputs_and_outputs_are_explained(known: dict[str, Definition], kind: str) -> None:
    node = known[kind]
    assert node.description.endswith(".")
    explained = {item.name: item.options.get("tooltip", "") for item in node.inputs}
    explained |= {f"output {output.name}": output.tooltip for output in node.outputs}
    assert not [name for name, tooltip in explained.items() if not tooltip.endswith((".", '"'))]


@pytest.mark.parametrize("kind", NODES)
def test_help_page_names_every_input_and_output(shared: ComfyServer, known: dict[str, Definition], kind: str) -> None:
    """Where the front end looks for it."""
    page = shared.request(f"/extensions/lunashm/docs/{kind}.md").decode()
    assert page.startswith(f"# {NODES[kind]}\n")
    inputs, _, rest = page.partition("\n## Inputs\n")[2].partition("\n## Outputs\n")
    outputs = rest.partition("\n## ")[0]
    for names, table in (((item.name for item in known[kind].inputs), inputs),
                         ((output.name for output in known[kind].outputs), outputs)):  # fmt: skip
        cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
        assert sorted(re.findall(r"`([^`]+)`", " ".join(cells))) == sorted(names)
    for heading in ("In ComfyUI's log", "Example", "What goes wrong"):
        assert f"\n## {heading}\n" in page


@pytest.mark.parametrize("kind", NODES)
def test_help_page_leads_to_an_example_with_the_node(shared: ComfyServer, kind: str) -> None:
    page = shared.request(f"/extensions/lunashm/docs/{kind}.md").decode()
    named = [name for name in examples.EXAMPLES if f"*{name}*" in page]
    assert named
    for name in named:
        workflow = json.loads((PACK / "example_workflows" / f"{name}.json").read_text())
        assert kind in {node["type"] for node in workflow["nodes"]}


def test_every_page_is_of_a_node() -> None:
    assert {path.stem for path in (PACK / "web" / "docs").iterdir()} == set(NODES)


def test_locale_files_are_in_step_and_reach_the_front_end(shared: ComfyServer, known: dict[str, Definition]) -> None:
    node_definitions = locales.node_definitions(known, MODULE)
    folder = PACK / "locales" / "en"
    assert (folder / "nodeDefs.json").read_text() == written(node_definitions), "run: python -m bench.pack"
    assert (folder / "main.json").read_text() == written(locales.main())
    served = json.loads(shared.request("/i18n"))["en"]
    assert served["nodeDefs"] == node_definitions
    assert served["nodeCategories"]["Luna"] == "Luna"


def test_no_locale_text_means_something_else_to_the_front_end() -> None:
    """vue-i18n compiles these characters: braces would be left out, a bar would make it two plural forms."""
    texts = (PACK / "locales" / "en" / "nodeDefs.json").read_text()
    values = re.findall(r'"(?:tooltip|description|display_name|name)": "((?:[^"\\]|\\.)*)"', texts)
    assert values
    assert not [value for value in values if set(value) & set(locales.SPECIAL)]
