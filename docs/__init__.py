"""The documentation: pages, and in `docs.tools` what makes some of them."""
