"""report.json -> Markdown, HTML with plots, JUnit."""
