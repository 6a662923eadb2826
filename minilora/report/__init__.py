"""What is shown to people: pages, charts, scores, comparisons."""
