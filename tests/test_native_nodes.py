"""What docs/native-nodes.md says about ComfyUI's nodes is what they do."""

import native_nodes
import pytest

pytestmark = pytest.mark.slow


def test_the_page_about_native_nodes_is_true(models_folder):
    """Rewritten by scripts/update_native_nodes.py."""
    assert native_nodes.page(models_folder) == native_nodes.PAGE.read_text(encoding="utf-8")
