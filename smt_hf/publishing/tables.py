"""Tables in Markdown."""


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table of texts; a `|` in a cell stays a letter."""
    rows = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
