"""Images with captions on one sheet, for a person to look at."""

from PIL import Image, ImageDraw


LINE_HEIGHT, LETTER_WIDTH = 12, 6  # pixels of the captions


def sheet(captioned: list[tuple[Image.Image, list[str]]], columns: int) -> Image.Image:
    """Put images on a sheet at their own size, each above its caption's lines, broken where they are too long."""
    width = max(320, *(picture.width for picture, _ in captioned)) + 10
    cells = [_cell(picture, texts, width) for picture, texts in captioned]
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    whole = Image.new("RGB", (width * columns, sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            whole.paste(cell, (column * width, sum(heights[:number])))
    return whole


def _cell(picture: Image.Image, texts: list[str], width: int) -> Image.Image:
    letters = width // LETTER_WIDTH
    lines = [text[i : i + letters] for text in texts for i in range(0, len(text), letters)]
    cell = Image.new("RGB", (width, picture.height + LINE_HEIGHT * len(lines) + 16), "white")
    cell.paste(picture, (0, 0))
    draw = ImageDraw.Draw(cell)
    for number, line in enumerate(lines):
        draw.text((2, picture.height + 4 + LINE_HEIGHT * number), line, fill="black")
    return cell
