"""Sphinx: builds these pages, which are plain Markdown and read as well without it."""

project = "ustack"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "ustack"
myst_heading_anchors = 3
