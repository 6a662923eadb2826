"""What a reader of a page sees."""

import html.parser


class Seen(html.parser.HTMLParser):
    """The tags of a page and the text between them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data
