"""The graph editor in headless Chromium, driven as a user would."""

import io
import json
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
READY = "() => window.app?.graph && window.app.extensionManager && document.querySelector('[data-testid=queue-button]')"
SMALL = {"steps": 2, "width": 64, "height": 64, "frames": 5}


class Editor:
    """One browser page with the editor of a server; a context manager.

    Args:
        url: of the server.
    """

    def __init__(self, url: str):
        self.url = url

    def __enter__(self) -> "Editor":
        self.playwright = sync_playwright().start()
        self.browser = self.playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        self.page: Page = self.browser.new_page(viewport={"width": 1600, "height": 950})
        self.page.goto(self.url)
        self.page.wait_for_function(READY, timeout=90_000)
        return self

    def __exit__(self, *exception: object) -> None:
        self.browser.close()
        self.playwright.stop()

    def open_template(self, name: str) -> None:
        """Find a workflow in the template browser by typing its name, and click its card."""
        self.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.page.wait_for_selector("[data-testid^=template-workflow-]")
        self.page.wait_for_timeout(1000)  # the search index is built after the first cards are shown
        self.page.get_by_text("All Templates", exact=True).first.click()  # a new user starts in another category
        self.page.locator("input[placeholder*=earch]").last.fill(name)
        self.page.locator(f'[data-testid="template-workflow-{name}"]').first.click(timeout=30_000)
        self.page.wait_for_selector("[data-testid=template-workflows-content]", state="detached")

    def unknown_types(self) -> list[str]:
        """Types of the open graph's nodes that the editor does not know."""
        return self.page.evaluate(
            "() => window.app.graph.nodes.map(n => n.type).filter(t => !(t in window.LiteGraph.registered_node_types))"
        )

    def prompt(self) -> dict:
        """The open graph in the API's format, as the editor converts it."""
        return json.loads(self.page.evaluate("async () => JSON.stringify((await window.app.graphToPrompt()).output)"))

    def make_small(self, values: dict = SMALL) -> None:
        """Type small values into the widgets of these names."""
        self.page.evaluate(
            """values => window.app.graph.nodes.flatMap(n => n.widgets ?? []).forEach(w => {
                if (w.name in values && typeof w.value === 'number') { w.value = values[w.name]; w.callback?.(w.value) }
            })""",
            values,
        )

    def set_locale(self, locale: str) -> None:
        """Change the language of the editor and open it again."""
        self.page.evaluate(
            "async (locale) => await window.app.extensionManager.setting.set('Comfy.Locale', locale)", locale
        )
        self.page.reload()
        self.page.wait_for_function(READY, timeout=90_000)

    def wait_for_result(self, node_type: str) -> None:
        """Wait until the node of a type shows a picture or a video that was made; only nodes in view show theirs."""
        self.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.page.wait_for_function(
            """type => window.app.graph.nodes.some(node => node.type === type &&
                (node.imgs?.length || node.videoContainer?.querySelector('video')))""",
            arg=node_type,
            timeout=60_000,
        )

    def run(self) -> None:
        """Press the Run button."""
        self.page.locator("[data-testid=queue-button]").click()

    def screenshot(self, path: Path, width: int = 1000) -> None:
        """A JPEG of the open graph alone, of this width."""
        page = self.page
        page.set_viewport_size({"width": 2600, "height": 1500})  # zoomed out further, nodes lose their text
        page.evaluate("async () => await window.app.extensionManager.setting.set('Comfy.Minimap.Visible', false)")
        page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        page.wait_for_timeout(2000)
        left, top, right, bottom = page.evaluate(
            """() => {
                const bounds = [...window.app.graph.nodes, ...window.app.graph.groups].map(item => item.boundingRect)
                const { offset, scale } = window.app.canvas.ds, at = (value, axis) => (value + offset[axis]) * scale
                return [
                    Math.min(...bounds.map(b => at(b[0], 0))), Math.min(...bounds.map(b => at(b[1], 1))),
                    Math.max(...bounds.map(b => at(b[0] + b[2], 0))),
                    Math.max(...bounds.map(b => at(b[1] + b[3], 1))),
                ]
            }"""
        )
        clip = {"x": left - 8, "y": top - 8, "width": right - left + 16, "height": bottom - top + 16}
        picture = Image.open(io.BytesIO(page.screenshot(clip=clip)))
        picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS).convert(
            "RGB"
        ).save(path, quality=75)
