"""The embedded demo: a tiny bilingual chat model, the corpus and script that made it, and an identity data set."""
