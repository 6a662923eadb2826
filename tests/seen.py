"""What a reader of a page sees."""

import html.parser


class Seen(html.parser.HTMLParser):
    """The elements of a page, (tag, attributes), and the text between them."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.tags = [tag for tag, _ in self.elements]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data
