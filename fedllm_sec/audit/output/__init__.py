"""What an audit looks like: on a terminal, as JSON, SARIF, Markdown and a page."""
